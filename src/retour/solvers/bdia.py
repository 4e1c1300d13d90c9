r"""BDIA: a one-step solver made reversible by crossing the last interval again, backwards.

Let :math:`D(i\to j)` be where a base solver lands at level j from :math:`z_i` (i counts from the
clean end). A plain sampler steps to :math:`D(i\to i-1)`. BDIA takes back a part :math:`\gamma` of
what carried it from :math:`z_{i+1}` to :math:`z_i` and puts in its place the same interval crossed
from :math:`z_i`, backwards:

.. math::
   \text{generation:}\quad & z_{i-1} = D(i\to i-1) + \gamma\,\big(z_{i+1} - D(i\to i+1)\big) \\
   \text{inversion:}\quad & z_{i+1} = D(i\to i+1) + \big(z_{i-1} - D(i\to i-1)\big)/\gamma

Both lines are one equation, linear in :math:`z_{i\pm1}`, and ask the network about :math:`z_i`
only: exact both ways, from data or from noise, as long as the *pair* of the last two levels is
kept. It travels in the state's memory, and a walk that turns round begins on the pair's other half
without asking. The first step of a fresh walk is the base solver's; with :math:`\gamma = 0` all
are. With :math:`\gamma = 1` the rule is of second order on any base; with less, the error is
:math:`(1-\gamma)/(1+\gamma)` of that of a first-order base. Uneven grids stay exact; the order
wants step lengths that vary smoothly.

Bases, all written as the DDIM landing :math:`\alpha_j X + \sigma_j E` plus a correction, so that
the ends of a path are ordinary points:

* ``bdia``: DDIM.
* ``bdia-edm``: Heun's rule, in flow coordinates as in :mod:`retour.solvers.runge_kutta`, or (option
  `coordinates`) as EDM has it: :math:`x/\alpha` against :math:`\sigma/\alpha`, with Euler's step to
  :math:`\sigma=0`. The paper's sampler is believed to cross backwards on the slope of the step
  before (``backward="stored"``, 2 evaluations a step). That slope belongs to :math:`z_{i+1}`, so
  its inversion would be implicit, and is refused. The default starts Heun's rule afresh from
  :math:`z_i`, which can be undone.
* ``bdia-dpm``: DPM-Solver++(2S), the midpoint in :math:`\lambda`; or 2M with the last prediction
  (``form="multi"``, 1 evaluation a step, generation only for the same reason). Intervals that reach
  an infinite :math:`\lambda` are DDIM's.

Limit: a parasitic mode, z alternating about its track, changes by :math:`-\gamma\,
\alpha_{i+1}/\alpha_{i-1}` in a generated step where the predicted noise stays what it is, and by
the reciprocal in an inverted one. Good predictions make up for the levels; :math:`\gamma^{-N}`, by
which inversion magnifies the mode, remains, and is warned of.

A float32 network is shown the latents rounded to `input_bits` bits (see
:mod:`retour.solvers._exact`), except at :math:`\gamma = 0`, where there is nothing to return on.

Cost: N evaluations for ``bdia``, 3N - 1 for the others; from a pair, those of N - 1 steps.

References: Zhang, Lewis, Kleijn, "Exact Diffusion Inversion via Bi-directional Integration
Approximation", ECCV 2024, arXiv 2307.10829; Karras et al., arXiv 2206.00364; Lu et al., arXiv
2211.01095.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.grid import Step
from ..core.path import Path, Prediction, levels
from ..core.registry import Paper, register
from ..core.solver import Denoise, Plain
from ..core.state import State
from ..errors import RetourError, check_range
from ._exact import AmplificationWarning, ask, check_bits

BDIA_PAPER = Paper(
    "Exact Diffusion Inversion via Bi-directional Integration Approximation",
    "Zhang, Guoqiang and Lewis, J. P. and Kleijn, W. Bastiaan",
    2023,
    "2307.10829",
    "ECCV 2024",
)
GROWTH_LIMIT = 1e3


@dataclass(frozen=True)
class BDIAOptions:
    """Options of BDIA.

    Attributes:
        gamma: part of the last interval that is crossed again, in [0, 1]. To generate, the paper's
            code takes 1 for about 40 steps and 0.5 for about 10, whose second-order part is large.
        input_bits: significant bits of the latents that the network is shown; None shows them as
            they are.
    """

    gamma: float = 1.0
    input_bits: int | None = 16

    def __post_init__(self) -> None:
        check_range("gamma", self.gamma, 0, 1)
        check_bits(self.input_bits)


@dataclass(frozen=True)
class _Here:
    """Where a step starts: latents `x` at time `t`, what the network says there, what was kept."""

    denoise: Denoise
    path: Path
    bits: int | None
    x: Tensor
    t: float
    found: Prediction
    kept: Mapping[str, Tensor]

    def ddim(self, s: float) -> Tensor:
        """DDIM's landing at time `s`."""
        alpha, sigma = levels(self.path, s, self.x)
        return alpha * self.found.x0 + sigma * self.found.eps

    def ask(self, x: Tensor, t: float) -> Prediction:
        """Prediction elsewhere."""
        return ask(self.denoise, x, t, self.path, self.bits)


@register(
    "bdia",
    task="solver",
    summary="DDIM that crosses each interval from both ends: exact, one evaluation a step",
    paper=BDIA_PAPER,
    options=BDIAOptions,
    exact=True,
    order=2,
    nfe="N",
    facts={"nfe_per_step": 1, "growth": "gamma^(-N)"},
)
class BDIA(Plain):
    """BDIA on DDIM; memory: the neighbour that was left, by the side it lies on, and its time."""

    def __init__(self, options: BDIAOptions):
        self.options = options

    def step(self, denoise: Denoise, state: State, step: Step, path: Path) -> State:
        """Cross one interval."""
        gamma = self.options.gamma
        self.check(step)
        ahead, behind = ("cleaner", "noisier") if step.down else ("noisier", "cleaner")
        left = {behind: state.x, "time": _column(state.x, step.t)}
        if ahead in state.memory and gamma > 0:
            return State(state.memory[ahead], left)
        bits = self.options.input_bits if gamma > 0 else None
        found = ask(denoise, state.x, step.t, path, bits)
        here = _Here(denoise, path, bits, state.x, step.t, found, state.memory)
        x = self.land(here, step.s, ahead=True)
        if behind in state.memory and gamma > 0:
            last = float(state.memory["time"].flatten()[0])
            gap = state.memory[behind] - self.land(here, last, ahead=False)
            x = x + (gamma * gap if step.down else gap / gamma)
        return State(x, {**left, **self.keep(here)})

    def land(self, here: _Here, s: float, *, ahead: bool) -> Tensor:
        """The base solver's landing at `s`, ahead of the walk or behind it."""
        return here.ddim(s)

    def keep(self, here: _Here) -> Mapping[str, Tensor]:
        """Further memory for the next step."""
        return {}

    def check(self, step: Step) -> None:
        """Warn, as an inversion begins, of a parasitic mode that will show at its end."""
        gamma = self.options.gamma
        if step.down or step.index > 0 or gamma == 0:
            return
        log_growth, log_limit = -step.count * math.log(gamma), math.log(GROWTH_LIMIT)
        if log_growth > log_limit:
            warnings.warn(
                f"BDIA over {step.count} steps at gamma {gamma} magnifies its parasitic mode about "
                f"1e{log_growth / math.log(10):.0f} times: use at most "
                f"{int(-log_limit / math.log(gamma))} steps, or a gamma of at least "
                f"{math.ceil(1000 * math.exp(-log_limit / step.count)) / 1000}",
                AmplificationWarning,
                stacklevel=2,
            )


@dataclass(frozen=True)
class BDIAEDMOptions(BDIAOptions):
    """Options of BDIA on Heun's rule.

    Attributes:
        coordinates: in which Heun's rule is applied, the flow's or EDM's.
        backward: the interval crossed backwards: by Heun's rule afresh, or on the slope of the last
            step (generation only).
    """

    coordinates: Literal["flow", "edm"] = "flow"
    backward: Literal["heun", "stored"] = "heun"


@register(
    "bdia-edm",
    task="solver",
    summary="BDIA on Heun's rule: exact, second order at any gamma, three evaluations a step",
    paper=BDIA_PAPER,
    options=BDIAEDMOptions,
    exact=True,
    order=2,
    nfe="3N-1",
    facts={"nfe_per_step": 3, "nfe_extra": -1},
)
class BDIAEDM(BDIA):
    """BDIA on Heun's rule; where slopes are stored its memory holds the last one."""

    options: BDIAEDMOptions

    def land(self, here: _Here, s: float, *, ahead: bool) -> Tensor:
        """DDIM's landing moved by half of the slope's change."""
        plain, reach = here.ddim(s), self._reach(here.path, here.t, s)
        if reach == 0:
            return plain
        again = ahead or self.options.backward == "heun"
        slope = self._slope(here.ask(plain, s)) if again else here.kept["slope"]
        return plain + reach / 2 * (slope - self._slope(here.found))

    def keep(self, here: _Here) -> Mapping[str, Tensor]:
        """The slope, if the next step shall reuse it."""
        return {"slope": self._slope(here.found)} if self.options.backward == "stored" else {}

    def check(self, step: Step) -> None:
        """Refuse to invert on stored slopes."""
        if self.options.backward == "stored":
            _only_down(step, "backward='stored'", "backward='heun'")
        super().check(step)

    def _slope(self, found: Prediction) -> Tensor:
        return found.velocity if self.options.coordinates == "flow" else found.eps

    def _reach(self, path: Path, t: float, s: float) -> float:
        """Length of the interval in the rule's clock, times its unit at `s`; 0 is Euler's step."""
        alpha_t, sigma_t = float(path.alpha(t)), float(path.sigma(t))
        alpha_s, sigma_s = float(path.alpha(s)), float(path.sigma(s))
        if self.options.coordinates == "flow":
            return sigma_s - sigma_t * (alpha_s + sigma_s) / (alpha_t + sigma_t)
        if alpha_t == 0 or alpha_s == 0 or sigma_s == 0:
            return 0.0
        return sigma_s - sigma_t * alpha_s / alpha_t


@dataclass(frozen=True)
class BDIADPMOptions(BDIAOptions):
    """Options of BDIA on DPM-Solver++.

    Attributes:
        form: single-step (2S), or multistep (2M, generation only).
    """

    form: Literal["single", "multi"] = "single"


@register(
    "bdia-dpm",
    task="solver",
    summary="BDIA on DPM-Solver++(2S): exact, second order at any gamma, three evaluations a step",
    paper=BDIA_PAPER,
    options=BDIADPMOptions,
    exact=True,
    order=2,
    nfe="3N-1",
    facts={"nfe_per_step": 3, "nfe_extra": -1},
)
class BDIADPM(BDIA):
    """BDIA on DPM-Solver++; in its multistep form its memory holds the last prediction."""

    options: BDIADPMOptions

    def land(self, here: _Here, s: float, *, ahead: bool) -> Tensor:
        """DDIM's landing moved towards the prediction in the middle of the interval."""
        plain, (lam, lam_s) = here.ddim(s), (float(here.path.lam(t)) for t in (here.t, s))
        if math.isinf(lam) or math.isinf(lam_s):
            return plain
        (alpha, sigma), (alpha_s, sigma_s) = (levels(here.path, t, here.x) for t in (here.t, s))
        weight = alpha_s - alpha * sigma_s / sigma
        if self.options.form == "single":
            middle = float(here.path.time((lam + lam_s) / 2))
            return plain + weight * (here.ask(here.ddim(middle), middle).x0 - here.found.x0)
        if "x0" not in here.kept:
            return plain
        gone = lam - float(here.path.lam(float(here.kept["time"].flatten()[0])))
        # Half of the way to `s` on the line through both predictions.
        part = (lam_s - lam) / (2 * gone) if math.isfinite(gone) else 0.0
        return plain + weight * part * (here.found.x0 - here.kept["x0"])

    def keep(self, here: _Here) -> Mapping[str, Tensor]:
        """The prediction, if the next step shall reuse it."""
        return {"x0": here.found.x0} if self.options.form == "multi" else {}

    def check(self, step: Step) -> None:
        """Refuse to invert with the last prediction."""
        if self.options.form == "multi":
            _only_down(step, "form='multi'", "form='single'")
        super().check(step)


def _column(x: Tensor, value: float) -> Tensor:
    """`value` once per row, (R, 1, 1, 1)."""
    return torch.full_like(x[(slice(None), *[slice(1)] * (x.ndim - 1))], value)


def _only_down(step: Step, chosen: str, instead: str) -> None:
    if not step.down:
        raise RetourError(f"BDIA with {chosen} only generates: to invert, use {instead}")
