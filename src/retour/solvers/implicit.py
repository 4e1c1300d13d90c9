r"""The implicit step: the exact inverse of a DDIM or Euler step, found by iteration.

Downwards from :math:`s` (noisy) to :math:`t` the sampler arrives at
:math:`\Phi(y) = \alpha_t X(y, s) + \sigma_t E(y, s)`. Upwards from :math:`x_t` the latents are
wanted from which it arrives there: :math:`\Phi(y) = x_t`, as a fixed point

.. math:: y = F(y), \qquad F(y) = y + \omega\,(x_t - \Phi(y)).

With :math:`\omega = \alpha_s/\alpha_t` this is the iteration of the papers,
:math:`F(y) = \tfrac{\alpha_s}{\alpha_t} x_t + (\sigma_s - \tfrac{\alpha_s}{\alpha_t}\sigma_t)\,
\epsilon(y, s)`; with :math:`\omega = (\alpha_s+\sigma_s)/(\alpha_t+\sigma_t)` it is the implicit
Euler rule of the flow, :math:`F(y) = x_t + (s - t)\,V(y, s)` on the linear path. The first serves
networks that predict noise, the second all others (it is finite at pure noise). The iteration
starts from DDIM inversion, for noise networks :math:`F(x_t)`.

*Plain* iteration converges where F contracts; guidance makes it expand. *Anderson acceleration*
combines the last few iterates so that their gaps :math:`g = F(y) - y` cancel best,

.. math:: y \leftarrow y + \beta g - (\Delta Y + \beta\,\Delta G)\gamma, \qquad
          \gamma = \arg\min \lVert g - \Delta G\,\gamma\rVert,

which also finds fixed points that repel. Each image has its own history and its own stop,
:math:`\lVert x_t - \Phi(y)\rVert \le \text{tolerance}\,\lVert x_t\rVert`, and leaves the batch of
the network calls there. An image whose residual doubles, or does not fall for five updates, goes
back to its best iterate, forgets its history and halves its mixing :math:`\beta` (damping),
whichever iteration is used.

The left side of the stop is the very error that this step leaves in the round trip; what the
sampler makes of it further down is the model's doing. A tolerance below the network's own rounding
(about 1e-7 for a guided float32 network) cannot be met. Some steps have no solution nearby, such as
long first steps at high guidance: then the best iterate is taken, and a warning says so at the end
of the walk. Memory: `residual`, of this step, and `worst`, of all so far.

Cost: 1 evaluation a step downwards; upwards, for each image, 1 to start, 1 to check that, and 1 for
each update.

References: Pan, Gherardi, Xie, Huang, "Effective Real Image Editing with Accelerated Iterative
Diffusion Inversion", ICCV 2023, arXiv 2309.04907 (Anderson acceleration); Meiri et al.,
"Fixed-point Inversion for Text-to-image diffusion models", 2023, arXiv 2312.12540v1 (plain).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.branches import Denoiser
from ..core.grid import Step
from ..core.path import Path, Prediction, levels
from ..core.registry import Paper, register
from ..core.rows import along
from ..core.solver import Denoise, Plain, kind_of
from ..core.state import State
from ..errors import RetourError, check_range
from ._exact import couples_noise
from .ddim import DDIM, DDIMOptions

AIDI_PAPER = Paper(
    "Effective Real Image Editing with Accelerated Iterative Diffusion Inversion",
    "Pan, Zhihong and Gherardi, Riccardo and Xie, Xiufeng and Huang, Stephen",
    2023,
    "2309.04907",
    "ICCV 2023",
)
GROWTH = 2.0  # a residual that many times an image's best says that its iteration diverges
EXACT_TO = 1e-4  # what the default tolerance leaves of a round trip, at most
STALL = 5  # updates without a new best after which it gets nowhere
RESTARTS = 5  # restarts in a row without a new best after which it gives up
COLLINEAR = 1e-8  # differences of gaps closer than that carry rounding only

Correct = Callable[[Prediction, Tensor, float, Sequence[int]], Prediction]


class ConvergenceWarning(UserWarning):
    """Steps were not inverted to the tolerance asked for."""


@dataclass(frozen=True)
class FixedPointOptions:
    """Options of the implicit step.

    Attributes:
        iterations: most updates in a step.
        tolerance: of the residual, relative to the latents, at which an image is done.
        acceleration: combine past iterates (`anderson`) or iterate plainly (`none`).
        history: how many past iterates are combined.
        mixing: part of the gap that is taken; below 1 the iteration is damped from the start.
    """

    iterations: int = 40
    tolerance: float = 1e-6
    acceleration: Literal["anderson", "none"] = "anderson"
    history: int = 5
    mixing: float = 1.0

    def __post_init__(self) -> None:
        check_range("iterations", self.iterations, 0)
        check_range("tolerance", self.tolerance, 0)
        check_range("history", self.history, 1)
        if not 0 < self.mixing <= 1:
            raise RetourError(f"mixing must be above 0 and at most 1, got {self.mixing}")


class Equation:
    """The equation of one step upwards.

    Args:
        denoise: the (guided) denoiser.
        x: (R, C, h, w) latents at the clean end.
        step: the interval.
        path: noise path.
        correct: rewrites predictions: (prediction, y, time, rows) -> prediction, for some rows.

    Attributes:
        images: number of images that converge on their own; rows of several branches go together.
    """

    def __init__(
        self,
        denoise: Denoise,
        x: Tensor,
        step: Step,
        path: Path,
        correct: Correct | None = None,
    ):
        self.denoise, self.x, self.step, self.path, self.correct = denoise, x, step, path, correct
        self.images = denoise.layout.images if isinstance(denoise, Denoiser) else len(x)
        self.alpha_t, self.sigma_t = levels(path, step.clean, x)
        alpha_s, sigma_s = levels(path, step.noisy, x)
        if couples_noise(kind_of(denoise)):
            self.gain = alpha_s / self.alpha_t
        else:
            self.gain = (alpha_s + sigma_s) / (self.alpha_t + self.sigma_t)

    def rows(self, images: Sequence[int]) -> list[int]:
        """The rows of some images, in all branches."""
        return [first + i for first in range(0, len(self.x), self.images) for i in images]

    def start(self) -> Tensor:
        """DDIM inversion."""
        ddim = DDIM(DDIMOptions(query="noisy"))
        return ddim.step(self.denoise, State(self.x), self.step, self.path).x

    def gap(self, y: Tensor, images: Sequence[int]) -> Tensor:
        """`F(y) - y` of some images' rows; `y` (R, C, h, w) holds all rows."""
        rows = self.rows(images)
        found = self._predict(y, images, rows)
        if self.correct is not None:
            found = self.correct(found, y[rows], self.step.noisy, rows)
        arrived = self.alpha_t * found.x0 + self.sigma_t * found.eps
        return self.gain * (self.x[rows] - arrived)

    def _predict(self, y: Tensor, images: Sequence[int], rows: Sequence[int]) -> Prediction:
        if len(images) == self.images:
            return self.denoise(y, self.step.noisy)
        if isinstance(self.denoise, Denoiser):
            return self.denoise.part(images)(y[rows], self.step.noisy)
        # A wrapped denoiser reads the whole stacked state.
        return self.denoise(y, self.step.noisy).map(lambda face: face[rows])

    def residual(self, gap: Tensor, images: Sequence[int]) -> Tensor:
        """Distance from the equation relative to the latents, one for each row of `gap`."""
        size = self.x[self.rows(images)].flatten(1).norm(dim=1)
        error = (gap / self.gain).flatten(1).norm(dim=1)
        return error / size.clamp_min(torch.finfo(size.dtype).tiny)


Measure = Callable[[Equation, Tensor, Sequence[int]], Tensor]


def solve(
    equation: Equation,
    y: Tensor,
    options: FixedPointOptions,
    measure: Measure = Equation.residual,
) -> tuple[Tensor, Tensor]:
    """Iterate from `y` (R, C, h, w); return each row's best iterate and its error (R,).

    `measure` tells the errors of some images' rows from their gaps.
    """
    search = _Search(y, options.mixing)
    past = _Past(y, options.history if options.acceleration == "anderson" else 0)
    images = list(range(equation.images))
    for turn in range(options.iterations + 1):
        rows = torch.tensor(equation.rows(images), device=y.device)
        gap = equation.gap(y, images)
        lost = search.note(turn, rows, y[rows], gap, measure(equation, gap, images))
        if turn == options.iterations:
            break
        y = y.index_copy(0, rows, past.step(rows, y[rows], gap, search.mixing[rows]))
        y[lost] = search.restart(turn, lost)
        past.forget(lost)
        going = search.going(options.tolerance).unflatten(0, (-1, equation.images))
        images = going.any(0).nonzero().flatten().tolist()
        if not images:
            break
    return search.best, search.error


class _Search:
    """How each row's search goes: its best iterate, that one's gap and error, its mixing."""

    def __init__(self, y: Tensor, mixing: float):
        self.best, self.gap = y.clone(), torch.zeros_like(y)
        self.error = y.new_full((len(y),), torch.inf)
        self.mixing = along(y.new_full((len(y),), mixing), y)
        self.since, self.restarts = torch.zeros(2, len(y), dtype=torch.long, device=y.device)

    def note(self, turn: int, rows: Tensor, y: Tensor, gap: Tensor, error: Tensor) -> Tensor:
        """Write down where some rows are; return those that diverge or get nowhere."""
        diverged = ~(error <= GROWTH * self.error[rows])  # not `>`: NaN diverges too
        better = error < self.error[rows]
        best = rows[better]
        self.best[best], self.gap[best], self.error[best] = y[better], gap[better], error[better]
        self.since[best], self.restarts[best] = turn, 0
        return rows[diverged | (turn - self.since[rows] >= STALL)]

    def restart(self, turn: int, rows: Tensor) -> Tensor:
        """Where some rows go on, damped, from their best iterates."""
        self.mixing[rows] /= 2
        self.since[rows] = turn
        self.restarts[rows] += 1
        return self.best[rows] + self.mixing[rows] * self.gap[rows]

    def going(self, tolerance: float) -> Tensor:
        """Rows that are neither done nor hopeless, (R,)."""
        return (self.error > tolerance) & (self.restarts <= RESTARTS)


class _Past:
    """Each row's last iterates, as differences; with none kept the iteration is plain."""

    def __init__(self, like: Tensor, size: int):
        self.turn, self.size = 0, size
        self.y, self.gap = like.clone(), torch.zeros_like(like)
        self.known = torch.zeros(len(like), dtype=torch.bool, device=like.device)
        self.dy, self.dgap = (like.new_zeros(size, *like.shape) for _ in range(2))

    def forget(self, rows: Tensor) -> None:
        """Begin those rows' histories anew."""
        self.known[rows] = False
        self.dy[:, rows], self.dgap[:, rows] = 0, 0

    def step(self, rows: Tensor, y: Tensor, gap: Tensor, mixing: Tensor) -> Tensor:
        """Next iterates of some rows; a difference that is not there yet is a column of zeros."""
        ahead = y + mixing * gap
        if self.size == 0:
            return ahead
        known = along(self.known[rows], y)
        self.dy[self.turn % self.size, rows] = torch.where(known, y - self.y[rows], 0)
        self.dgap[self.turn % self.size, rows] = torch.where(known, gap - self.gap[rows], 0)
        self.turn += 1
        self.y[rows], self.gap[rows], self.known[rows] = y, gap, True
        dy, dgap = (d[:, rows].flatten(2).permute(1, 2, 0) for d in (self.dy, self.dgap))
        finite = gap.flatten(1).nan_to_num(0, 0, 0)[..., None]
        weights = torch.linalg.pinv(dgap.nan_to_num(0, 0, 0), rtol=COLLINEAR) @ finite
        moved = (dy + mixing.flatten(1)[..., None] * dgap) @ weights
        return ahead - moved.reshape(y.shape)


@register(
    "fixed-point",
    task="solver",
    summary="DDIM and Euler inverted exactly, by iterating their implicit equation",
    paper=AIDI_PAPER,
    options=FixedPointOptions,
    exact=True,
    order=1,
    nfe="N down, kN up",
    facts={
        "nfe_per_step": 1,
        "inversion_nfe_per_step": (2, 42),
        "exact_to": EXACT_TO,
        "tight": {"tolerance": 1e-13, "iterations": 100},
    },
)
class FixedPoint(Plain):
    """The implicit step upwards, DDIM downwards."""

    def __init__(self, options: FixedPointOptions):
        self.options = options

    def step(self, denoise: Denoise, state: State, step: Step, path: Path) -> State:
        """Cross one interval."""
        if step.down:
            return DDIM(DDIMOptions()).step(denoise, State(state.x), step, path)
        equation = Equation(denoise, state.x, step, path)
        x, residual = solve(equation, equation.start(), self.options)
        residual = along(residual, x)
        worst = torch.maximum(residual, state.memory.get("worst", residual))
        if step.index == step.count - 1:
            _warn(worst, self.options)
        return State(x, {"residual": residual, "worst": worst})


def _warn(worst: Tensor, options: FixedPointOptions) -> None:
    late = int((~(worst <= options.tolerance)).sum())
    if late:
        warnings.warn(
            f"{late} of {len(worst)} latents were inverted to a residual of up to "
            f"{float(worst.max()):.1e} instead of {options.tolerance:g}: use more steps, a smaller "
            f"guidance, more than {options.iterations} iterations, or a wider tolerance",
            ConvergenceWarning,
            stacklevel=2,
        )
