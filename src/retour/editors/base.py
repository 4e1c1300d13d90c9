"""What every editor is given and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.branches import Branch, Layout
from ..core.control import Control
from ..core.grid import Grid
from ..core.model import Model
from ..core.state import Inversion


@dataclass(frozen=True)
class EditJob:
    """An edit to do, in one batch of named branches.

    Attributes:
        model: the generative model.
        inversion: where the way back starts; its states are the source trajectory.
        layout: branches of the state: ``source`` (if the editor wants it) and the targets.
        targets: branch name -> its B target prompts.
        grid: the grid walked down.
        mask: (B, 1, h, w) in [0, 1] at latent size, 1 where editing is allowed; None: everywhere.
    """

    model: Model
    inversion: Inversion
    layout: Layout
    targets: dict[str, tuple[str, ...]]
    grid: Grid
    mask: Tensor | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """The B source prompts."""
        return self.inversion.prompts


class Editor:
    """Turns a job into a control; holds options only.

    Attributes:
        source_branch: whether the run carries the source beside the targets.
    """

    source_branch: ClassVar[bool] = False

    def arrange(self, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """Branches of the run, given the usual ones; auxiliary ones may be added at the end."""
        return branches

    def control(self, job: EditJob) -> Control:
        """What this editor does to the run."""
        raise NotImplementedError
