r"""pix2pix-zero's inversion: DDIM whose predicted noise is kept looking like noise.

At guidance 1 with the source prompt, each predicted noise e is regularised before the step is made
with it: five rounds of five gradient steps on its autocorrelation and one on its divergence from
the unit Gaussian,

.. math::
    L_{ac} &= \sum_{channels}\ \sum_{levels}\ \sum_{axes}
        \operatorname{mean}\big(e \odot \operatorname{roll}(e, r)\big)^2, \qquad
    L_{kl} = \operatorname{var}(e) + \operatorname{mean}(e)^2 - 1 - \log(\operatorname{var}(e) +
        10^{-7})\\
    e &\leftarrow e - \tfrac{20}{5}\,\nabla L_{ac} \ (\times 5), \qquad e \leftarrow e - 20\,\nabla
        L_{kl}

where levels are a pyramid of 2 x 2 averages down to an edge of 8, and r is random for each channel
and level, the same for both axes and for all images. Var and mean run over each whole image.

Conventions: r = 0 compares a picture with itself, which is no correlation between neighbours and
pulls e to zero; the published code draws it too (``rolls="published"``: r from 0, by default from
1; both below half of the edge). That code also leaves out the first and the last interval of the
grid, so that its latents are read two steps noisier than they are (``inner=True``); the benchmark
that made it comparable, and we, cross all of them.

Whatever the network predicts, its noise is what is regularised and what is held over the interval.
Both losses are means, so a step is the longer the fewer places there are: 16 times as long on 16 x
16 latents as on 64 x 64; below about 8 x 8 it is too long to settle.

Cost: N evaluations; the regularisation itself asks nothing of the network.

Reference: Parmar et al., "Zero-shot Image-to-Image Translation", SIGGRAPH 2023, arXiv 2302.03027.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.branches import Denoiser, Layout, Wrapped
from ..core.control import Control
from ..core.grid import Grid, Step
from ..core.path import Path, Prediction, levels, predict
from ..core.registry import Paper, get, register
from ..core.solver import Solver
from ..core.state import Inversion
from ..errors import RetourError, check_range
from .base import Job, Replay
from .ddim import DDIMOptions

ZERO_PAPER = Paper(
    title="Zero-shot Image-to-Image Translation",
    authors="Parmar, Gaurav and Singh, Krishna Kumar and Zhang, Richard and Li, Yijun and "
    "Lu, Jingwan and Zhu, Jun-Yan",
    year=2023,
    arxiv="2302.03027",
    venue="SIGGRAPH 2023",
)

ROUNDS = 5
STEPS = 5
LEAST_EDGE = 8
STABILISER = 1e-7


@dataclass(frozen=True)
class Pix2PixZeroOptions(DDIMOptions):
    """Options of pix2pix-zero's inversion.

    Attributes:
        correlation: weight of the autocorrelation; 0 leaves it out.
        divergence: weight of the divergence from the unit Gaussian; 0 leaves it out.
        rolls: smallest shift drawn: 1 (`nonzero`) or 0 (`published`).
        inner: leave out the first and the last interval, as published.
    """

    correlation: float = 20.0
    divergence: float = 20.0
    rolls: Literal["nonzero", "published"] = "nonzero"
    inner: bool = False


@register(
    "pix2pix-zero",
    task="invert",
    summary="DDIM with its predicted noise regularised to look like noise",
    paper=ZERO_PAPER,
    options=Pix2PixZeroOptions,
    order=1,
    nfe="N",
    stochastic=True,
    needs={"vp"},
    provides={"trajectory"},
)
class Pix2PixZeroInversion:
    """DDIM up with regularised noise, plain DDIM down."""

    def __init__(self, options: Pix2PixZeroOptions):
        self.options = options
        check_range("correlation", options.correlation, 0)
        check_range("divergence", options.divergence, 0)

    def solver(self) -> Solver:
        """DDIM, both ways."""
        return get("solver", "ddim").make(query=self.options.query)

    def invert(self, job: Job) -> Inversion:
        """Walk up with the source prompt, regularising."""
        grid = job.grid.truncate(self.options.strength)
        regular = _Regular(job.generator, self.options)
        job = replace(job, controls=[*job.controls, regular])
        if not self.options.inner:
            states = job.climb(self.solver(), grid, self.options.inversion_guidance)
            return job.pack("pix2pix-zero", self.options, grid, states)
        if grid.steps < 3:
            raise RetourError(f"inner=true leaves out two steps of {grid.steps}: take 3 or more")
        inside = Grid(grid.times[1:-1])
        states = job.climb(self.solver(), inside, self.options.inversion_guidance)
        states = {k: torch.cat([v[:1], v, v[-1:]]) for k, v in states.items()}
        return job.pack("pix2pix-zero", self.options, grid, states)

    def replay(self, inversion: Inversion) -> Replay:
        """Walk down."""
        return Replay(self.solver(), inversion.end())


class _Regular(Control):
    """Regularises the noise of every prediction."""

    def __init__(self, generator: torch.Generator, options: Pix2PixZeroOptions):
        self.generator, self.options = generator, options

    def denoiser(
        self, step: Step, denoise: Denoiser | Wrapped, layout: Layout
    ) -> Denoiser | Wrapped:
        """Predictions with regularised noise."""
        return _Noise(denoise, self._rule(denoise.model.path))

    def _rule(self, path: Path) -> Callable[[Prediction, Tensor, float], Prediction]:
        def rule(prediction: Prediction, x: Tensor, t: float) -> Prediction:
            alpha, sigma = levels(path, t, x)
            if float(alpha) == 0:
                return prediction  # pure noise: x says all about it
            eps = regularised(prediction.eps, self.generator, self.options)
            return predict("eps", eps, x, alpha, sigma)

        return rule


class _Noise(Wrapped):
    """A denoiser whose noise is what a solver holds over an interval."""

    @property
    def kind(self) -> str:
        """Noise, whatever the network predicts."""
        return "eps"


def regularised(e: Tensor, generator: torch.Generator, options: Pix2PixZeroOptions) -> Tensor:
    """Noise (B, C, h, w) nearer to white unit Gaussian noise, image by image."""
    least = 0 if options.rolls == "published" else 1
    for _ in range(ROUNDS):
        for _ in range(STEPS if options.correlation else 0):
            pull = slope(lambda leaf: correlation(leaf, generator, least), e)
            e = e - options.correlation / STEPS * pull
        if options.divergence:
            e = e - options.divergence * slope(divergence, e)
    return e


def slope(loss: Callable[[Tensor], Tensor], e: Tensor) -> Tensor:
    """Gradient of a loss per image (B,)."""
    leaf = e.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(loss(leaf).sum(), leaf)[0]


def correlation(e: Tensor, generator: torch.Generator, least: int = 1) -> Tensor:
    """Autocorrelation loss per image, (B,), at random shifts of `least` or more."""
    total = e.new_zeros(len(e))
    while True:
        edge = min(e.shape[-2:])
        high = max(least + 1, edge // 2)
        shifts = torch.randint(least, high, (e.shape[1],), generator=generator).to(e.device)
        for turned in (e, e.transpose(-1, -2)):
            total = total + (turned * _rolled(turned, shifts)).mean((-1, -2)).square().sum(1)
        if edge <= LEAST_EDGE:
            return total
        e = F.avg_pool2d(e, 2)


def _rolled(e: Tensor, shifts: Tensor) -> Tensor:
    """Roll (B, C, h, w) along h, each channel by its own shift."""
    channels, height = e.shape[1:3]
    places = torch.arange(height, device=e.device) - shifts[:, None]
    return e[:, torch.arange(channels, device=e.device)[:, None], places % height]


def divergence(e: Tensor) -> Tensor:
    """Divergence from the unit Gaussian per image, (B,), twice over."""
    values = e.flatten(1)
    variance = values.var(1)
    return variance + values.mean(1) ** 2 - 1 - torch.log(variance + STABILISER)
