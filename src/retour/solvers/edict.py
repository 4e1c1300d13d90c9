r"""EDICT: two coupled latents, each moved by a step that is affine in itself; exactly invertible.

With :math:`t` the noisier end of the interval, :math:`f(\cdot) = \epsilon(\cdot, t)` always asked
there, and :math:`A = \alpha_s/\alpha_t`, :math:`B = \sigma_s - A\sigma_t` (DDIM as an affine
map), generation does

.. math::
   x' &= A x_t + B f(y_t)             & y' &= A y_t + B f(x') \\
   x_s &= p\,x' + (1-p)\,y'           & y_s &= p\,y' + (1-p)\,x_s

and inversion undoes the four lines in reverse order. In every other interval, counted from the
noisy end, the first line moves y and the second x. That parity belongs to the interval
(:attr:`~retour.core.grid.Step.position`), so any number of steps is undone exactly; code that
counts it along the inversion is exact for even numbers only.

Where we deviate: :math:`A` has no value at :math:`\alpha_t = 0`, so for networks that do not
predict noise (v, flow velocity, clean data) the coupled field is the flow velocity
:math:`V(\cdot, t)`, with :math:`A = c_s/c_t`, :math:`B = c_s (u_s - u_t)`, :math:`c =
\alpha+\sigma`, :math:`u = \sigma/c`: Euler's affine map, exact by the same algebra and finite
from pure noise to clean data.

Limit: the mixing shrinks :math:`x - y` by :math:`p^2` a step downwards, hence rounding *and* the
pair's real difference grow by :math:`p^{-2}` a step upwards: 1,400 times over 50 steps of p =
0.93, 2 million over 100. A warning comes before that; as N grows at fixed p the inversion does
not converge (generation does).

Rounding alone: the round trip is at :math:`10^{-13}` or better (float64 state; a network in any
precision, if it is asked the same again); with noise as the field, coarse grids that end near
:math:`\alpha_t = 0` lose up to :math:`(\alpha_0/\alpha_T)^2` of it.

A float32 network would not answer the same again about a state that differs by rounding: it is
shown the latents rounded to `input_bits` bits (see :mod:`retour.solvers._exact`).

Cost: 2 evaluations a step.

Reference: Wallace, Gokul, Naik, "EDICT: Exact Diffusion Inversion via Coupled Transformations",
CVPR 2023, arXiv 2211.12446.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

from torch import Tensor

from ..core.grid import Step
from ..core.path import Path
from ..core.registry import Paper, register
from ..core.solver import Denoise, kind_of
from ..core.state import State
from ..errors import RetourError
from ._exact import GROWTH_LIMIT, AmplificationWarning, check_bits, couples_noise, held, snap

EDICT_PAPER = Paper(
    "EDICT: Exact Diffusion Inversion via Coupled Transformations",
    "Wallace, Bram and Gokul, Akash and Naik, Nikhil",
    2023,
    "2211.12446",
    "CVPR 2023",
)


@dataclass(frozen=True)
class EDICTOptions:
    """Options of EDICT.

    Attributes:
        mixing: the weight :math:`p` that keeps the pair together, in (0, 1].
        input_bits: significant bits of the latents that the network is shown; None shows them as
            they are.
    """

    mixing: float = 0.93
    input_bits: int | None = 16

    def __post_init__(self) -> None:
        if not 0 < self.mixing <= 1:
            raise RetourError(f"mixing must be above 0 and at most 1, got {self.mixing}")
        check_bits(self.input_bits)


@register(
    "edict",
    task="solver",
    summary="two coupled latents: exact in both directions, two evaluations a step",
    paper=EDICT_PAPER,
    options=EDICTOptions,
    exact=True,
    order=1,
    nfe="2N",
    facts={"nfe_per_step": 2, "inversion_order": None, "growth": "p^(-2N)"},
)
class EDICT:
    """The coupled pair; memory: `y`, the partner of `x`."""

    def __init__(self, options: EDICTOptions):
        self.options = options

    def start(self, x: Tensor) -> State:
        """Two equal copies."""
        return State(x, {"y": x})

    def step(self, denoise: Denoise, state: State, step: Step, path: Path) -> State:
        """Cross one interval."""
        pair = state.x, state.memory["y"]
        if step.down:
            x, y = self._mix(*self._move(denoise, *pair, step, path))
        else:
            if step.index == 0:
                self._check_growth(step.count)
            x, y = self._move(denoise, *self._unmix(*pair), step, path)
        return State(x, {**state.memory, "y": y})

    def _move(
        self, denoise: Denoise, x: Tensor, y: Tensor, step: Step, path: Path
    ) -> tuple[Tensor, Tensor]:
        scale, gain = _affine(path, step, kind_of(denoise))

        def field(x: Tensor) -> Tensor:
            found = denoise(snap(x, self.options.input_bits), step.noisy)
            return held(kind_of(denoise), found)

        swap = step.position % 2 == 1
        first, second = (y, x) if swap else (x, y)
        if step.down:
            first = scale * first + gain * field(second)
            second = scale * second + gain * field(first)
        else:
            second = (second - gain * field(first)) / scale
            first = (first - gain * field(second)) / scale
        return (second, first) if swap else (first, second)

    def _mix(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        p = self.options.mixing
        x = p * x + (1 - p) * y
        return x, p * y + (1 - p) * x

    def _unmix(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        p = self.options.mixing
        y = (y - (1 - p) * x) / p
        return (x - (1 - p) * y) / p, y

    def _check_growth(self, steps: int) -> None:
        growth = -2 * steps * math.log(self.options.mixing)
        if growth <= math.log(GROWTH_LIMIT):
            return
        most = int(math.log(GROWTH_LIMIT) / (-2 * math.log(self.options.mixing)))
        least = math.ceil(1000 * GROWTH_LIMIT ** (-1 / (2 * steps))) / 1000
        warnings.warn(
            f"EDICT over {steps} steps at mixing {self.options.mixing} multiplies the difference "
            f"of its two copies, and rounding, by about 1e{growth / math.log(10):.0f}: use at most "
            f"{most} steps, or a mixing of at least {least}",
            AmplificationWarning,
            stacklevel=2,
        )


def _affine(path: Path, step: Step, kind: str) -> tuple[float, float]:
    """Coefficients `(A, B)` of the map from the noisy to the clean end."""
    alpha_t, sigma_t = float(path.alpha(step.noisy)), float(path.sigma(step.noisy))
    alpha_s, sigma_s = float(path.alpha(step.clean)), float(path.sigma(step.clean))
    if couples_noise(kind):
        return alpha_s / alpha_t, sigma_s - alpha_s / alpha_t * sigma_t
    c_t, c_s = alpha_t + sigma_t, alpha_s + sigma_s
    return c_s / c_t, c_s * (sigma_s / c_s - sigma_t / c_t)
