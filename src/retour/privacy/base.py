r"""What every attack is given and what it returns.

An attack looks for a point near an inverted image's starting latents :math:`x_T` whose picture a
classifier gets wrong. It sees the generator as one map, the way back

.. math:: D: x_T \mapsto z_0

of the inversion that was made: the same solver, prompt, guidance and stored noise, so that
:math:`D(x_T)` is the image itself wherever the inversion is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..core.branches import Branch, Denoiser
from ..core.loop import walk
from ..core.model import Ledger, Model
from ..core.registry import get
from ..core.state import Inversion, State
from ..errors import RetourError
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
        if inversion.model is None:
            raise RetourError(
                f"this inversion has no model attached: load {inversion.model_name!r} and pass it "
                "to Inversion.load(path, model)"
            )
        self.inversion, self.model = inversion, inversion.model
        method = get("invert", inversion.method).make(**inversion.options)
        self.replay = method.replay(inversion)
        # "target", since a method's correction of its source branch would undo every change.
        names = ["source", "target"] if self.replay.source_branch else ["target"]
        self.denoiser = Denoiser(
            self.model,
            [Branch(n, inversion.condition, inversion.negative, inversion.guidance) for n in names],
            ledger=ledger,
        )

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Starting latents (B, C, h, w) -> data latents; no solver memory outlives a call."""
        state = self._start(x).map(lambda v: v.to(self.model.device))
        grid, controls = self.inversion.grid, [self.replay.control]
        end = walk(self.replay.solver, self.denoiser, state, grid, down=True, controls=controls)
        return end.x[self.denoiser.layout["target"]]

    def _start(self, x: Tensor) -> State:
        still, coupled = self.replay.state, self.inversion.states
        gap = x - still.x
        memory = {k: v + gap if k in coupled else v for k, v in still.memory.items()}
        if not self.replay.source_branch:
            return State(x, memory)
        both = {k: torch.cat([still.memory[k], v]) for k, v in memory.items()}
        return State(torch.cat([still.x, x]), both)


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

    Its options name the `inverter`, its `steps` and `strength`, and the `guidance` of both ways.
    """

    def attack(self, job: AttackJob) -> Found:
        """Look for starting latents whose pictures the classifier gets wrong."""
