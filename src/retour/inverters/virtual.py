r"""Virtual inversion (InfEdit's DDCM): a source chain that always points to its data, at no cost.

At any noisy :math:`x` there is one noise for which the data is the answer,

.. math:: \epsilon_{cons} = (x_s - \alpha\,x_0)/\sigma,

so a chain of the source that returns to :math:`x_0` exists from any start, without asking the
network. On the way back the source's prediction is replaced by :math:`(x_0, \epsilon_{cons})`, and
what that changes is changed in every target as well:

.. math:: X_t \leftarrow X_t + (x_0 - X_s), \qquad E_t \leftarrow E_t + (\epsilon_{cons} - E_s)

(the paper's :math:`x_0 + [(x_t - x_s) - \sigma(E_t - E_s)]/\alpha`, and finite at pure noise). A
target with the source's prompt and state is the source; what differs is what the prompts change.
Steps resample noise, the same for all branches: :math:`x' = \alpha' X + \sigma'\sqrt{1-\eta}\,E +
\sigma'\sqrt\eta\,n`; at eta = 1 this is consistency sampling. The last step lands on X itself: the
model's grid is walked down to exactly clean data.

The source is asked at `inversion_guidance`, 1 as in the paper, the targets at the edit's.

Where we deviate: at eta below 1 the source keeps its own noise :math:`\epsilon_{cons}`, where the
published code lends it that of another branch. With `strength` 1 the start is pure noise, as in the
paper's benchmark run; with less it is the noised data.

Cost: none to invert; on the way back the source is asked too: N evaluations beside the targets'.

Reference: Xu et al., "Inversion-Free Image Editing with Language-Guided Diffusion Models", CVPR
2024, arXiv 2312.04965.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.branches import Denoiser, Layout, Wrapped
from ..core.grid import Grid, Step
from ..core.path import Path, Prediction, levels
from ..core.registry import Paper, get, register
from ..core.rows import copies
from ..core.solver import Solver
from ..core.state import Inversion, State
from ..errors import check_range
from ._noise_maps import GivenNoise, Known
from .base import Job, Replay

INFEDIT_PAPER = Paper(
    "Inversion-Free Image Editing with Language-Guided Diffusion Models",
    "Xu, Sihan and Huang, Yidong and Pan, Jiayi and Ma, Ziqiao and Chai, Joyce",
    2023,
    "2312.04965",
    "CVPR 2024",
)


@dataclass(frozen=True)
class VirtualOptions:
    """Options of virtual inversion.

    Attributes:
        eta: part of the noise variance that each step draws afresh, in [0, 1].
        inversion_guidance: guidance scale of the source on the way back.
        strength: part of the grid that is walked, from the clean end; 1 starts from pure noise.
    """

    eta: float = 1.0
    inversion_guidance: float = 1.0
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_range("eta", self.eta, 0, 1)


@register(
    "virtual",
    task="invert",
    summary="no inversion: a source chain that always points to its data (InfEdit)",
    paper=INFEDIT_PAPER,
    options=VirtualOptions,
    exact=True,
    nfe="0",
    stochastic=True,
    provides={"trajectory", "source", "anchored", "exact"},
)
class VirtualInversion:
    """The source's chain in closed form; targets corrected by the source's error."""

    def __init__(self, options: VirtualOptions):
        self.options = options

    def solver(self) -> Solver:
        """Resampling steps."""
        eta = math.sqrt(self.options.eta)
        solver: Solver = get("solver", "ddpm").make(eta=eta, spread="full")
        return solver

    def invert(self, job: Job) -> Inversion:
        """Draw all noise and follow the source's chain."""
        path, data = job.model.path, job.latents
        grid = _to_clean(job.grid.truncate(self.options.strength), path)
        start, *noise = job.noise(grid.steps + 1)
        t, solver = grid.times[-1], self.solver()
        x = path.add_noise(data, start, t)
        if self.options.strength == 1:
            alpha, sigma = levels(path, t, data)
            x = (alpha**2 + sigma**2).sqrt() * start
        states = [x]
        for step in grid.walk(down=True):
            known = Known(points_to(data, states[-1], step.t, path))
            state = State(states[-1], {"noise": noise[step.index]})
            states.append(solver.step(known, state, step, path).x)
        states[-1] = data
        return job.pack(
            "virtual",
            self.options,
            grid,
            {"x": torch.stack(states[::-1])},
            noise=torch.stack(noise),
        )

    def replay(self, inversion: Inversion) -> Replay:
        """Walk down with the source's error taken from all branches."""
        control = _Consistent(inversion, self.options.inversion_guidance)
        return Replay(self.solver(), State(inversion.noise), control, source_branch=True)


def points_to(data: Tensor, x: Tensor, t: float, path: Path) -> Prediction:
    """The prediction at `(x, t)` whose clean face is `data`."""
    alpha, sigma = levels(path, t, x)
    return Prediction(data, (x - alpha * data) / sigma)


def _to_clean(grid: Grid, path: Path) -> Grid:
    """The grid with exactly clean data as its clean end."""
    return Grid((path.t_clean, *grid.times[1:]))


class _Consistent(GivenNoise):
    """Shared noise, and predictions of which the source's is right."""

    def __init__(self, inversion: Inversion, scale: float):
        super().__init__(inversion, scale)
        self.data = inversion.latents

    def denoiser(
        self, step: Step, denoise: Denoiser | Wrapped, layout: Layout
    ) -> Denoiser | Wrapped:
        """Correct every branch by what is wrong with the source."""
        source = layout["source"]

        def correct(found: Prediction, x: Tensor, t: float) -> Prediction:
            right = points_to(self.data.to(x), x[source], t, denoise.model.path)

            def face(given: Tensor, wanted: Tensor) -> Tensor:
                moved = given + copies(wanted - given[source], len(layout.names))
                moved[source] = wanted
                return moved

            return Prediction(face(found.x0, right.x0), face(found.eps, right.eps))

        return Wrapped(denoise, correct)
