"""Branches that follow an inverted trajectory instead of their own predictions."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from ..attention.control import AttentionControl
from ..core.branches import Branch, Denoiser, Layout
from ..core.control import Control
from ..core.grid import Step
from ..core.loop import walk
from ..core.model import Ledger, Model
from ..core.registry import get
from ..core.state import Inversion, State


class OnTrack(Control):
    """After each step the named branches stand where the inversion stood, bit for bit.

    What the solver remembers of the latents follows too, where the inversion has it.

    Args:
        inversion: whose states are followed.
        names: branches that follow; those absent from a run are passed over.
        watching: attention controls to hook.
    """

    def __init__(
        self,
        inversion: Inversion,
        names: Collection[str] = ("source",),
        watching: Sequence[AttentionControl] = (),
    ):
        self.inversion, self.names, self.watching = inversion, frozenset(names), watching

    def attention(self) -> Sequence[AttentionControl]:
        """What it was given."""
        return self.watching

    def after_step(self, step: Step, state: State, before: State, layout: Layout) -> State:
        """Overwrite."""

        def follow(value: Tensor, track: Tensor) -> Tensor:
            return layout.replaced(value, dict.fromkeys(self.names, track.to(value)))

        return state.beside(self.inversion.at(step.arrival), follow)


def watch_source(
    model: Model, inversion: Inversion, watching: Sequence[AttentionControl], ledger: Ledger
) -> None:
    """Return along the source prompt, on the inverted track, for attention controls to see.

    The network is asked at every inverted state but the clean one, without guidance: N evaluations.
    """
    walk(
        get("solver", "ddim").make(),
        Denoiser(model, [Branch("source", inversion.condition)], ledger=ledger),
        State(inversion.noise.to(model.device)),
        inversion.grid,
        down=True,
        controls=[OnTrack(inversion, watching=watching)],
        label="look",
    )
