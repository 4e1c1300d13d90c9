"""What every editor is given and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ..core.branches import Branch, Denoiser, Layout
from ..core.control import Control
from ..core.grid import Grid
from ..core.model import Model
from ..core.state import Inversion, State
from ..inverters.base import Replay


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


@dataclass(frozen=True)
class Start:
    """Where the run of an edit begins.

    Attributes:
        state: the stacked state of all branches.
        depth: index in the grid of the time that it belongs to; 0 leaves nothing to walk.
        facts: what was found on the way there, for the record.
    """

    state: State
    depth: int
    facts: Mapping[str, Any] = field(default_factory=dict)


class Editor:
    """Turns a job into a control; holds options only.

    Attributes:
        source_branch: whether the run carries the source beside the targets.
        masks: whether it takes the user's mask into its own hands; if not, the run is blended with
            the inverted trajectory outside of it.
    """

    source_branch: ClassVar[bool] = False
    masks: ClassVar[bool] = False

    def arrange(self, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """Branches of the run, given the usual ones; auxiliary ones may be added at the end."""
        return branches

    def control(self, job: EditJob) -> Control:
        """What this editor does to the run."""
        raise NotImplementedError

    def replay(self, replay: Replay) -> Replay:
        """How the run comes back: the inverter's way; an editor may bring its own sampler."""
        return replay

    def prepare(self, job: EditJob, denoiser: Denoiser, replay: Replay) -> Start:
        """Where the run begins: by default all branches at the inversion's noisy end.

        Searches and walks of an editor's own happen here. They ask `denoiser`, its parts
        (`only`), or further ones on its ledger, so that they are counted.
        """
        return Start(replay.state.tile(len(denoiser.branches)), job.grid.steps)
