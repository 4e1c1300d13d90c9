r"""What every attack is given and what it returns.

An attack looks for a point near an inverted image's starting latents :math:`x_T` whose picture a
classifier gets wrong. It sees the generator as one map, the way back

.. math:: D: x_T \mapsto z_0

of the inversion that was made: the same solver, prompt, guidance and stored noise, so that
:math:`D(x_T)` is the image itself wherever the inversion is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..core.branches import Branch, Denoiser
from ..core.loop import walk
from ..core.model import Ledger, Model
from ..core.state import Inversion, State
from ..inverters.base import way_back
from .classifiers import Classifier

STEEPNESS = 1e3
MARGIN = 1e-4


class WayBack:
    """The map D from starting latents to data latents, along an inversion's own way back.

    Coupled latents that a solver carries (EDICT's partner) move with the starting latents; noise
    maps, embeddings and offsets stay as they are.

    Args:
        inversion: with its model attached.
        ledger: where evaluations are counted.
    """

    def __init__(self, inversion: Inversion, ledger: Ledger | None = None):
        self.inversion, self.model = inversion, inversion.attached()
        self.replay = way_back(inversion)
        # "target", since a method's correction of its source branch would undo every change.
        names = ["source", "target"] if self.replay.source_branch else ["target"]
        self.denoiser = Denoiser(
            self.model,
            [Branch(n, inversion.condition, inversion.negative, inversion.guidance) for n in names],
            ledger=ledger,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Starting latents (B, C, h, w) -> data latents; no solver memory outlives a call."""
        return self.picked(self.track(x)[-1])

    @torch.no_grad()
    def track(self, x: Tensor) -> list[State]:
        """Every state of the way back from `x`, the starting one first."""
        states = [self._start(x).map(lambda v: v.to(self.model.device))]
        for interval in reversed(range(self.inversion.grid.steps)):
            states.append(self._step(states[-1], interval))
        return states

    def picked(self, state: State) -> Tensor:
        """Data latents (B, C, h, w) of a state at the clean end."""
        return state.x[self.denoiser.layout["target"]]

    def pull(self, x: Tensor, track: Sequence[State], gradient: Tensor) -> Tensor:
        r"""Gradient in the data latents -> gradient in the starting latents, :math:`J^T G`.

        Every step is walked once more, from the clean end on, and differentiated alone, so that
        memory holds the graph of one step, however many there are.

        Args:
            x: starting latents (B, C, h, w).
            track: what :meth:`track` gives for them.
            gradient: of some aim in the data latents (B, C, h, w).
        """
        end = State(torch.zeros_like(track[-1].x))
        end.x[self.denoiser.layout["target"]] = gradient.to(end.x)
        for interval, state in enumerate(reversed(track[:-1])):
            end = _pulled(partial(self._step, interval=interval), state, end)
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            start = self._start(leaf).map(lambda v: v.to(self.model.device))
        outputs, weights = _paired(start, end)
        [found] = torch.autograd.grad(outputs, leaf, weights)
        return found.to(x)

    def _step(self, state: State, interval: int) -> State:
        """One interval of the way back, counted from the clean end."""
        return walk(
            self.replay.solver,
            self.denoiser,
            state,
            self.inversion.grid,
            down=True,
            between=(interval, interval + 1),
            controls=[self.replay.control],
        )

    def _start(self, x: Tensor) -> State:
        still, coupled = self.replay.state, self.inversion.states
        gap = x - still.x
        memory = {k: v + gap if k in coupled else v for k, v in still.memory.items()}
        if not self.replay.source_branch:
            return State(x, memory)
        both = {k: torch.cat([still.memory[k], v]) for k, v in memory.items()}
        return State(torch.cat([still.x, x]), both)


def _pulled(step: Callable[[State], State], before: State, end: State) -> State:
    """Gradient in what `step` makes of `before` -> gradient in `before`.

    Memory that is latents counts too; memory of another shape is the solver's clock.
    """
    latents = {k: v for k, v in before.memory.items() if v.shape == before.x.shape}
    x, *memory = leaves = [v.detach().requires_grad_() for v in (before.x, *latents.values())]
    with torch.enable_grad():
        after = step(State(x, {**before.memory, **dict(zip(latents, memory, strict=True))}))
    outputs, weights = _paired(after, end)
    found = torch.autograd.grad(outputs, leaves, weights, allow_unused=True)
    x, *memory = (
        torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)
    )
    return State(x, dict(zip(latents, memory, strict=True)))


def _paired(state: State, gradient: State) -> tuple[list[Tensor], list[Tensor]]:
    """What of `state` has a graph, beside the gradient in it."""
    pairs = [(state.x, gradient.x), *((state.memory[k], v) for k, v in gradient.memory.items())]
    kept = [(value, weight) for value, weight in pairs if value.requires_grad]
    return [value for value, _ in kept], [weight for _, weight in kept]


def bounded(values: Tensor) -> Tensor:
    r"""Map pixel values into [0, 1] (up to 1e-4), with a gradient also just outside.

    Inside nothing changes; above 1 it is :math:`(\tanh(1000(v-1)) + 10^4)/(10^4 + 1)`, below 0
    :math:`\tanh(1000 v)/10^4`. Both edges jump by less than 1e-4.

    Reference: Chen et al., "Content-based Unrestricted Adversarial Attack", 2023, arXiv 2305.10665.
    """
    above = (torch.tanh(STEEPNESS * (values - 1)) * MARGIN + 1) / (1 + MARGIN)
    below = torch.tanh(STEEPNESS * values) * MARGIN
    return torch.where(values > 1, above, torch.where(values < 0, below, values))


def rounded(images: Tensor) -> Tensor:
    """Images in [0, 1] as an 8-bit file keeps them."""
    return (images.clamp(0, 1) * 255).round() / 255


@dataclass
class AttackJob:
    """A classifier to test on inverted images.

    Attributes:
        inversion: B images taken to starting latents, model attached.
        classifier: the classifier that the attack may differentiate.
        labels: (B,) right classes.
        images: (B, 3, H, W) the inputs, in [0, 1], at the model's size.
        ledger: where evaluations are counted.
    """

    inversion: Inversion
    classifier: Classifier
    labels: Tensor
    images: Tensor
    ledger: Ledger = field(default_factory=Ledger)

    def __post_init__(self) -> None:
        self.denoise = WayBack(self.inversion, self.ledger)

    @property
    def model(self) -> Model:
        """The generative model."""
        return self.denoise.model

    @property
    def start(self) -> Tensor:
        """Inverted starting latents x_T (B, C, h, w)."""
        return self.denoise.replay.state.x

    def render(self, z0: Tensor) -> Tensor:
        """Data latents -> images (B, 3, H, W) in [0, 1], differentiable."""
        return bounded(self.model.decode(z0) / 2 + 0.5)


@dataclass
class Found:
    """What an attack found, image by image.

    Attributes:
        start: (B, C, h, w) starting latents of the pictures to return.
        margins: (B,) margin of each of them in the search.
        trace: (turns, B) margin of every picture on the way, the unchanged one first.
        unchanged: (B, C, h, w) data latents that the unchanged starting latents give.
    """

    start: Tensor
    margins: Tensor
    trace: Tensor
    unchanged: Tensor


class Attacker(Protocol):
    """An attack; holds options only.

    Its options name the `inverter`, its `steps` and `strength`.
    """

    def guidance(self, model: Model) -> float:
        """Guidance scale of both ways."""

    def attack(self, job: AttackJob) -> Found:
        """Look for starting latents whose pictures the classifier gets wrong."""
