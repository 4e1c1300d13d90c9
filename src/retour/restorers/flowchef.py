r"""FlowChef: restore by steering a sampling run towards the measurement.

From pure noise the model's own sampler walks down; at every step the clean estimate is moved down
the gradient of :math:`\tfrac12 |A D(\hat x_0) - y|^2`, with the network's velocity held, so that
nothing is ever differentiated through the network (see :mod:`.steering` for the step and its size
:math:`\kappa`). On a flow model this is the paper's algorithm; it runs on every path, in flow
coordinates.

Where we deviate: the paper's pixel models need no decoder; for latent models the measurement is
compared in pixels, through the decoder alone, as its InstaFlow experiments do (its 100 steps are
the default here too), but with plain gradient steps of a portable size. (Their Adam, made afresh at
every step, turns the gradient into its sign or, for a small loss, into itself divided by 1e-8.) Its
pixel models take :math:`\kappa = 0.081` at 200 steps, where every direction counts alike; a decoder
is steep in a few directions, which are what :math:`\kappa` refers to, and with 1 the others move
enough: 0.3 fitted worse in all of inpainting, deblurring and enlarging (28 steps, 12 pictures).
``space="latent"`` compares latents instead, without any decoder, where the operator acts on cells
(inpainting, denoising): a cell counts if all of its pixels are known. ``gradient="full"``
differentiates through the network, DPS's way, for comparison. Not here: the code's gradient-free
form, which adds :math:`y - A \hat x_0` itself and so needs an A that maps pixels to pixels.

What the picture shows is worth more than any of this: without a prompt the model answers in a hole
with some picture of its kind. :func:`retour.restore` therefore proposes one if it is given none.

Cost: N evaluations (2N with guidance), each 1 + `again` times before the last `free` steps, and, in
pixels, one pass through the decoder and back for each inner step; no memory for the network's
gradient.

Reference: Patel et al., "Steering Rectified Flow Models in the Vector Field for Controlled Image
Generation", 2024, arXiv 2412.00100 (ICCV 2025 as "FlowChef").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ..core.loop import walk
from ..core.path import levels
from ..core.registry import Paper, get, register
from ..core.solver import Solver
from ..errors import RetourError, check_range
from .base import RestoreJob
from .operators import Identity, Inpaint
from .steering import Cost, Distance, Gradient, Measurement, Steer

FLOWCHEF_PAPER = Paper(
    "Steering Rectified Flow Models in the Vector Field for Controlled Image Generation",
    "Patel, Maitreya and Wen, Song and Metaxas, Dimitris N. and Yang, Yezhou",
    2024,
    "2412.00100",
    "ICCV 2025",
)


STEPS = 100


@dataclass(frozen=True)
class FlowChefOptions:
    """Options of FlowChef's restoration.

    Attributes:
        kappa: part of the error that one inner step removes where the cost is steepest; 2 and more
            diverges. The paper's pixel models take 0.081 at 200 steps.
        inner: steps of descent for each answer of the network.
        free: last steps that are left alone.
        again: how often the network is asked anew at the moved state in a step.
        space: where the measurement is compared.
        gradient: hold the velocity (`skip`), or differentiate through the network (`full`).
    """

    kappa: float = 1.0
    inner: int = 1
    free: int = 1
    again: int = 0
    space: Literal["pixel", "latent"] = "pixel"
    gradient: Gradient = "skip"

    def __post_init__(self) -> None:
        check_steering(self.kappa, self.inner, self.free)
        check_range("again", self.again, 0)
        if self.gradient == "full" and (self.inner, self.again) != (1, 0):
            raise RetourError(
                "gradient 'full' takes one step in each interval, got "
                f"inner = {self.inner} and again = {self.again}: give 1 and 0"
            )


def check_steering(kappa: float, inner: int, free: int) -> None:
    """Refuse sizes and counts that cannot be meant."""
    check_range("kappa", kappa, 0)
    check_range("inner", inner, 1)
    check_range("free", free, 0)


@register(
    "flowchef",
    task="restore",
    summary="sampling steered towards the measurement, no gradient through the network",
    paper=FLOWCHEF_PAPER,
    options=FlowChefOptions,
    nfe="N",
    stochastic=True,
    needs={"gradients", "image"},
    facts={"steps": STEPS},
)
class FlowChef:
    """FlowChef for linear inverse problems."""

    def __init__(self, options: FlowChefOptions | None = None):
        self.options = FlowChefOptions() if options is None else options

    def restore(self, job: RestoreJob) -> Tensor:
        """Walk down from noise, steered."""
        options, denoiser = self.options, job.denoiser()
        steer = Steer(
            {"target": self.cost(job)},
            options.kappa,
            inner=options.inner,
            free=options.free,
            again=options.again,
            gradient=options.gradient,
        )
        solver: Solver = get("solver", "ddim").make()
        noise = job.noise()
        _, sigma = levels(job.model.path, job.grid.times[-1], noise)
        end = walk(
            solver,
            denoiser,
            solver.start(sigma * noise),
            job.grid,
            down=True,
            controls=[steer],
            label="restore",
        )
        return end.x

    def cost(self, job: RestoreJob) -> Cost:
        """What is descended on."""
        if self.options.space == "pixel":
            return Measurement(job.model, job.operator, job.observed)
        if not isinstance(job.operator, (Identity, Inpaint)):
            raise RetourError(
                f"space 'latent' compares cells, which operator {job.operator.name!r} mixes: use "
                "space 'pixel'"
            )
        z = job.model.encode(job.operator.guess(job.observed).clamp(-1, 1))
        if isinstance(job.operator, Identity):
            return Distance(z)
        return Distance(z, known_cells(job.operator.known, z))


def known_cells(known: Tensor, z: Tensor) -> Tensor:
    """(H, W) or (B, 1, H, W) known pixels -> latent cells of which every pixel is known."""
    pixels = known.reshape(-1, 1, *known.shape[-2:]).to(z)
    factor = pixels.shape[-1] // z.shape[-1]
    return -F.max_pool2d(-pixels, factor)
