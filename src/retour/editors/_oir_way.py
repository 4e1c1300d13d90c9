"""One image's way back from its inversion, walked in parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..core.branches import Branch, Denoiser
from ..core.control import Control
from ..core.grid import Step
from ..core.guidance import Guidance
from ..core.loop import walk
from ..core.model import Condition, Ledger, Model
from ..core.registry import entries, get
from ..core.state import Inversion, State
from ..inverters.base import Replay


class SourceAsNegative(Control):
    """Guidance leads away from the source prompt, so that equal prompts cancel at any scale."""

    def __init__(self, condition: Condition):
        self.condition = condition

    def branches(self, step: Step, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """All but the source's own."""
        return tuple(
            b if b.name == "source" else replace(b, uncond=self.condition) for b in branches
        )


@dataclass(frozen=True)
class Way:
    """The way back of one image.

    Attributes:
        model: the model.
        inversion: of this image alone.
        replay: how its inverter returns.
        scale: guidance scale.
        rule: how guidance combines predictions.
        ledger: where evaluations are counted.
    """

    model: Model
    inversion: Inversion
    replay: Replay
    scale: float
    rule: Guidance | None = None
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def steps(self) -> int:
        """Number of depths."""
        return self.inversion.grid.steps

    def at(self, depth: int) -> State:
        """The inverted state of that depth."""
        return self.inversion.at(depth).map(lambda v: v.to(self.model.device))

    def embed(self, prompt: str) -> Condition:
        """A prompt for this image."""
        return self.model.embed([prompt], size=self.inversion.size)

    def denoiser(self, condition: Condition, names: Sequence[str]) -> Denoiser:
        """Rows of one prompt, guided away from the source prompt; the source's if it is needed."""
        source, negative = self.inversion.condition, self.inversion.negative
        made = [Branch(name, condition, source, self.scale) for name in names]
        if self.replay.source_branch:
            made.insert(0, Branch("source", source, negative, self.scale))
        return Denoiser(self.model, made, guidance=self.rule, ledger=self.ledger)

    def down(
        self, state: State, condition: Condition, names: Sequence[str], high: int, low: int
    ) -> State:
        """Guided rows of one prompt from depth `high` to depth `low`."""
        if self.replay.source_branch:
            # The inverter corrects its targets by the source, which runs beside them.
            state = together([self.at(high), self.kept(state)])
        end = walk(
            self.replay.solver,
            self.denoiser(condition, names),
            state,
            self.inversion.grid,
            down=True,
            between=(low, high),
            controls=[self.replay.control, SourceAsNegative(self.inversion.condition)],
        )
        return end.map(lambda v: v[1:]) if self.replay.source_branch else end

    def up(self, state: State, low: int, high: int) -> State:
        """The source prompt alone, without guidance, from depth `low` to depth `high`."""
        solver = self.replay.solver
        if any(isinstance(solver, e.factory) and e.stochastic for e in entries("solver")):
            solver = get("solver", "ddim").make(query="noisy")
        source = Branch("source", self.inversion.condition)
        net = Denoiser(self.model, [source], ledger=self.ledger)
        grid = self.inversion.grid
        return self.kept(walk(solver, net, state, grid, down=False, between=(low, high)))

    def kept(self, state: State) -> State:
        """A state without what a solver remembers of the way that it came."""
        memory = {k: v for k, v in state.memory.items() if k in self.inversion.states}
        return State(state.x, memory)


def split(state: State) -> list[State]:
    """One state for each row."""
    memory = {k: v.split(1) for k, v in state.memory.items()}
    return [State(x, {k: v[i] for k, v in memory.items()}) for i, x in enumerate(state.x.split(1))]


def together(states: Sequence[State]) -> State:
    """One state of all rows."""
    memory = {k: torch.cat([s.memory[k] for s in states]) for k in states[0].memory}
    return State(torch.cat([s.x for s in states]), memory)
