r"""Negative-prompt inversion: the source prompt takes the null prompt's place on the way back.

What null-text inversion spends minutes to find lies near the source prompt's own embedding
:math:`c`. With :math:`n = c` the source branch is
:math:`\epsilon_c + w(\epsilon_c - \epsilon_c) = \epsilon_c`, so at any guidance it takes the way of
guidance 1, the one on which DDIM inversion is nearly right; and a target is pushed away from the
source prompt, :math:`\epsilon_c + w(\epsilon_{tgt} - \epsilon_c)`, instead of from no prompt.

The *whole* condition is exchanged (pooled embeddings too), or the identity would not hold.
``interpolation`` moves n on the great circle from the source prompt (0) to the null prompt (1), on
each image's flattened embedding, as later code does; a negative prompt given while inverting stands
for the null prompt there, and else gives way.

Cost: N evaluations, none of them for optimisation.

Reference: Miyake, Iohara, Saito, Tanaka, "Negative-prompt Inversion: Fast Image Inversion for
Editing with Text-guided Diffusion Models", 2023, arXiv 2305.16807.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.branches import Branch
from ..core.control import Control
from ..core.grid import Step
from ..core.model import Condition
from ..core.registry import Paper, get, register
from ..core.solver import Solver
from ..core.state import Inversion
from ..errors import check_range
from .base import Replay, SolverInverter
from .ddim import DDIMOptions

PARALLEL = 1e-4  # radians; sines of smaller angles lose half of the digits of float64


@dataclass(frozen=True)
class NegativePromptOptions(DDIMOptions):
    """Options of negative-prompt inversion.

    Attributes:
        interpolation: from the source prompt (0) to the null prompt (1, plain DDIM).
    """

    interpolation: float = 0.0


@register(
    "negative-prompt",
    task="invert",
    summary="the source prompt as negative prompt: null-text inversion without optimisation",
    paper=Paper(
        "Negative-prompt Inversion: Fast Image Inversion for Editing with Text-guided Diffusion "
        "Models",
        "Miyake, Daiki and Iohara, Akihiro and Saito, Yu and Tanaka, Toshiyuki",
        2023,
        "2305.16807",
    ),
    options=NegativePromptOptions,
    order=1,
    nfe="N",
    provides={"trajectory"},
)
class NegativePromptInversion(SolverInverter):
    """DDIM up; DDIM down with the source prompt as negative prompt."""

    name = "negative-prompt"
    options: NegativePromptOptions

    def __init__(self, options: NegativePromptOptions):
        super().__init__(options)
        check_range("interpolation", options.interpolation, 0, 1)

    def solver(self) -> Solver:
        """DDIM, both ways."""
        return get("solver", "ddim").make(query=self.options.query)

    def replay(self, inversion: Inversion) -> Replay:
        """Walk down with every unconditional row reading the source prompt."""
        null = between(inversion.condition, inversion.negative, self.options.interpolation)
        return Replay(self.solver(), inversion.end(), _Negative(null))


class _Negative(Control):
    """One condition for all unconditional rows."""

    def __init__(self, null: Condition):
        self.null = null

    def branches(self, step: Step, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """Guide away from it."""
        return tuple(
            branch if branch.uncond is None else replace(branch, uncond=self.null)
            for branch in branches
        )


def between(start: Condition, end: Condition, part: float) -> Condition:
    """The condition a `part` of the way from `start` to `end`, tensor by tensor."""
    if part == 0:
        return start
    tensors = {k: slerp(v, end.tensors[k].to(v), part) for k, v in start.tensors.items()}
    return start.with_tensors(**tensors)


def slerp(start: Tensor, end: Tensor, part: float) -> Tensor:
    r"""Spherical interpolation of rows (B, ...), each flattened: constant angular speed.

    :math:`(\sin((1-p)\omega)\, a + \sin(p\,\omega)\, b) / \sin\omega`, with :math:`\omega` the
    angle between a and b; linear where they are parallel.
    """
    a, b = (v.reshape(len(v), -1).double() for v in (start, end))
    cosine = torch.nn.functional.cosine_similarity(a, b)
    angle = cosine.clamp(-1, 1).acos()[:, None]
    curved = (((1 - part) * angle).sin() * a + (part * angle).sin() * b) / angle.sin()
    straight = (1 - part) * a + part * b
    flat = (angle < PARALLEL) | (angle > torch.pi - PARALLEL)
    return torch.where(flat, straight, curved).reshape(start.shape).to(start.dtype)
