r"""Noise paths and the exact conversions between the things a network may predict.

Every path is :math:`x_t = \alpha(t)\,x_0 + \sigma(t)\,\epsilon` with :math:`t` growing towards
noise. With :math:`X = E[x_0|x_t]` and :math:`E = E[\epsilon|x_t]` all parameterisations are affine
images of each other at fixed :math:`(x_t, t)`:

=============  ==============================  =====================================================
kind           meaning                         recovers
=============  ==============================  =====================================================
``eps``        :math:`E`                       :math:`X = (x - \sigma E)/\alpha`
``x0``         :math:`X`                       :math:`E = (x - \alpha X)/\sigma`
``v``          :math:`\alpha E - \sigma X`     :math:`X = (\alpha x - \sigma v)/(\alpha^2+\sigma^2)`
``velocity``   :math:`E - X`                   :math:`X = (x - \sigma v)/(\alpha + \sigma)`
``score``      :math:`-E/\sigma`               :math:`E = -\sigma S`
=============  ==============================  =====================================================

``velocity`` is the rectified-flow output (diffusers' sign, from data to noise). For other paths it
is the velocity in *flow coordinates* :math:`y = x/(\alpha+\sigma)`, :math:`u =
\sigma/(\alpha+\sigma)`, in which every path is the linear flow :math:`y_u = (1-u)x_0 + u\epsilon`:
so each flow solver runs on each path, and Euler there is exactly DDIM. The probability-flow
velocity :math:`dx/dt` (kind ``ode``) needs the path's derivatives, see :meth:`Path.rates`.

Reference: Lai et al., "The Principles of Diffusion Models", 2025, arXiv 2510.21890.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Time = float | Tensor


def as_time(t: Time) -> Tensor:
    """Return `t` as a float64 tensor (bf16 and even float32 times are too coarse)."""
    return torch.as_tensor(t, dtype=torch.float64)


class Path(ABC):
    """A noise path: `alpha(t)` and `sigma(t)` in float64, `t` a float or a broadcastable tensor."""

    name: str
    t_clean: float
    t_noise: float

    @abstractmethod
    def alpha(self, t: Time) -> Tensor:
        """Signal level at `t`."""

    @abstractmethod
    def sigma(self, t: Time) -> Tensor:
        """Noise level at `t`."""

    @abstractmethod
    def time(self, lam: Time) -> Tensor:
        r"""Return the `t` whose half log-SNR :math:`\log(\alpha/\sigma)` is `lam`."""

    def lam(self, t: Time) -> Tensor:
        r"""Half log-SNR :math:`\lambda = \log(\alpha/\sigma)`; the clock that all paths share."""
        return torch.log(self.alpha(t)) - torch.log(self.sigma(t))

    def flow_time(self, t: Time) -> Tensor:
        r"""Time on the equivalent linear flow, :math:`u = \sigma/(\alpha+\sigma)` in [0, 1]."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        return sigma / (alpha + sigma)

    def from_flow_time(self, u: Time) -> Tensor:
        """Inverse of :meth:`flow_time`."""
        u = as_time(u)
        return self.time(torch.log1p(-u) - torch.log(u))

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        r"""Derivatives :math:`(\alpha'(t), \sigma'(t))`, by autograd in float64."""
        leaf = as_time(t).detach().clone().requires_grad_()
        with torch.enable_grad():
            alpha = torch.autograd.grad(self.alpha(leaf).sum(), leaf)[0]
            sigma = torch.autograd.grad(self.sigma(leaf).sum(), leaf)[0]
        return alpha, sigma

    def add_noise(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        r"""Forward kernel :math:`\alpha(t) x_0 + \sigma(t) \epsilon`, in `x0`'s dtype."""
        alpha, sigma = levels(self, t, x0)
        return alpha * x0 + sigma * noise


def levels(path: Path, t: Time, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return `(alpha, sigma)` on `like`'s device and dtype.

    A vector `t` of length B is given trailing axes, so that it broadcasts over `like` (B, ...).
    """
    pair = (path.alpha(t), path.sigma(t)) if isinstance(t, Tensor) else _scalar_levels(path, t)
    alpha, sigma = (level.to(device=like.device, dtype=like.dtype) for level in pair)
    if alpha.ndim == 1 and like.ndim > 1:
        shape = (-1, *[1] * (like.ndim - 1))
        return alpha.reshape(shape), sigma.reshape(shape)
    return alpha, sigma


@lru_cache(maxsize=4096)
def _scalar_levels(path: Path, t: float) -> tuple[Tensor, Tensor]:
    # A run asks for the same few times again and again; a table's levels are not free. Kept levels
    # must be ordinary tensors: one made under inference mode would break a later gradient.
    with torch.inference_mode(False):
        return path.alpha(t), path.sigma(t)


class FlowPath(Path):
    r"""Linear flow (rectified flow): :math:`\alpha = 1-t`, :math:`\sigma = t`, t in [0, 1]."""

    name = "flow"
    t_clean, t_noise = 0.0, 1.0

    def alpha(self, t: Time) -> Tensor:
        """`1 - t`."""
        return 1.0 - as_time(t)

    def sigma(self, t: Time) -> Tensor:
        """`t`."""
        return as_time(t)

    def time(self, lam: Time) -> Tensor:
        """Inverse of the half log-SNR."""
        return torch.sigmoid(-as_time(lam))


@dataclass(frozen=True)
class LinearVP(Path):
    r"""Continuous VP, linear beta: :math:`\log\alpha = -t^2(\beta_1-\beta_0)/4 - t\beta_0/2`.

    `t` is in [0, 1].
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    name = "vp"
    t_clean, t_noise = 0.0, 1.0

    def _log_alpha(self, t: Time) -> Tensor:
        t = as_time(t)
        return -(t**2) * (self.beta_max - self.beta_min) / 4 - t * self.beta_min / 2

    def alpha(self, t: Time) -> Tensor:
        """Signal level."""
        return torch.exp(self._log_alpha(t))

    def sigma(self, t: Time) -> Tensor:
        """Noise level, `sqrt(1 - alpha^2)` without cancellation."""
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def _time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        gap = self.beta_max - self.beta_min
        root = torch.sqrt(self.beta_min**2 - 4 * gap * log_alpha)
        return -4 * log_alpha / (root + self.beta_min)

    def time(self, lam: Time) -> Tensor:
        """Inverse of the half log-SNR."""
        return self._time_of_log_alpha(-0.5 * torch.nn.functional.softplus(-2 * as_time(lam)))


@dataclass(frozen=True)
class SubVP(LinearVP):
    r"""Sub-VP of score SDEs: the VP's alpha with :math:`\sigma = 1 - \alpha^2`."""

    name = "sub-vp"

    def sigma(self, t: Time) -> Tensor:
        """Noise level `1 - alpha^2`."""
        return -torch.expm1(2 * self._log_alpha(t))

    def time(self, lam: Time) -> Tensor:
        r"""Inverse of the half log-SNR; :math:`\alpha/(1-\alpha^2) = e^\lambda` has
        :math:`\log\alpha = -\mathrm{asinh}(e^{-\lambda}/2)`.
        """
        return self._time_of_log_alpha(-torch.asinh(torch.exp(-as_time(lam)) / 2))


class CosinePath(Path):
    r"""Cosine VP: :math:`\alpha = \cos(\pi t/2)`, :math:`\sigma = \sin(\pi t/2)`, t in [0, 1]."""

    name = "cosine"
    t_clean, t_noise = 0.0, 1.0

    def alpha(self, t: Time) -> Tensor:
        """Signal level."""
        return torch.cos(as_time(t) * math.pi / 2)

    def sigma(self, t: Time) -> Tensor:
        """Noise level."""
        return torch.sin(as_time(t) * math.pi / 2)

    def time(self, lam: Time) -> Tensor:
        """Inverse of the half log-SNR."""
        return torch.atan(torch.exp(-as_time(lam))) * 2 / math.pi


@dataclass(frozen=True)
class VEPath(Path):
    r"""Variance exploding (EDM): :math:`\alpha = 1`, :math:`\sigma = t`."""

    sigma_max: float = 80.0
    name = "ve"
    t_clean = 0.0

    @property
    def t_noise(self) -> float:  # type: ignore[override]
        """Largest sigma."""
        return self.sigma_max

    def alpha(self, t: Time) -> Tensor:
        """Always one."""
        return torch.ones_like(as_time(t)) + 0 * as_time(t)

    def sigma(self, t: Time) -> Tensor:
        """`t` itself."""
        return as_time(t)

    def time(self, lam: Time) -> Tensor:
        """Inverse of the half log-SNR."""
        return torch.exp(-as_time(lam))


class DiscreteVP(Path):
    r"""A table of :math:`\bar\alpha` at the integer training steps (SD 1.x, 2.x, SDXL).

    `t = 0 .. T-1` are the trained levels; `t = -1` is clean data (:math:`\bar\alpha = 1`), so both
    conventions for the last level (``set_alpha_to_one``) are ordinary times. Between integers the
    half log-SNR is interpolated linearly; between -1 and 0 :math:`\bar\alpha` is.

    Args:
        alphas_cumprod: (T,) decreasing, in (0, 1].
    """

    name = "vp"
    t_clean = -1.0

    def __init__(self, alphas_cumprod: Tensor | Sequence[float]):
        abar = torch.as_tensor(alphas_cumprod).detach().to("cpu", torch.float64)
        if abar.ndim != 1 or len(abar) < 2 or not bool((abar[1:] < abar[:-1]).all()):
            raise ValueError("alphas_cumprod must be one-dimensional and strictly decreasing")
        self.abar = abar
        self.table = 0.5 * (torch.log(abar) - torch.log1p(-abar))
        self.t_noise = float(len(abar) - 1)

    def _abar(self, t: Tensor) -> Tensor:
        inner = t.clamp(0.0, self.t_noise)
        low = inner.floor().clamp(max=self.t_noise - 1).long()
        part = inner - low
        lam = self.table[low] * (1 - part) + self.table[low + 1] * part
        smooth = torch.sigmoid(2 * lam)
        exact = torch.where(part == 0, self.abar[low], smooth)
        exact = torch.where(part == 1, self.abar[low + 1], exact)
        # The table's values, but the interpolation's slope: `rates` holds at trained levels too.
        exact = smooth + (exact - smooth).detach()
        return torch.where(t < 0, self.abar[0] - t.clamp(-1, 0) * (1 - self.abar[0]), exact)

    def alpha(self, t: Time) -> Tensor:
        r""":math:`\sqrt{\bar\alpha}`."""
        return torch.sqrt(self._abar(as_time(t)))

    def sigma(self, t: Time) -> Tensor:
        r""":math:`\sqrt{1-\bar\alpha}`."""
        return torch.sqrt(1 - self._abar(as_time(t)))

    def time(self, lam: Time) -> Tensor:
        """Inverse of the half log-SNR."""
        lam = as_time(lam)
        rising = -self.table
        low = (torch.searchsorted(rising, (-lam).contiguous()) - 1).clamp(0, len(rising) - 2)
        part = (self.table[low] - lam) / (self.table[low] - self.table[low + 1])
        below = -(torch.sigmoid(2 * lam) - self.abar[0]) / (1 - self.abar[0])
        return torch.where(lam > self.table[0], below, low + part)


def betas(schedule: str, start: float, end: float, steps: int) -> Tensor:
    """Return the (steps,) float64 betas of a schedule: `linear` or `scaled_linear`."""
    if schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    raise ValueError(f"unknown beta schedule {schedule!r}: use 'linear' or 'scaled_linear'")


@dataclass(frozen=True)
class Prediction:
    """What a network said at `(x, t)`, as its two equivalent faces.

    Attributes:
        x0: predicted clean latents, (B, C, H, W), in the state's dtype.
        eps: predicted noise, same shape.
    """

    x0: Tensor
    eps: Tensor

    @property
    def velocity(self) -> Tensor:
        r"""Rectified-flow velocity :math:`E - X`, from data to noise."""
        return self.eps - self.x0

    def map(self, fn) -> Prediction:  # type: ignore[no-untyped-def]
        """Apply `fn` to both faces (indexing, weighting: anything linear)."""
        return Prediction(fn(self.x0), fn(self.eps))


def predict(kind: str, value: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    """Turn a network output `value` of the given `kind` at `x` into a :class:`Prediction`.

    Args:
        kind: one of ``eps``, ``x0``, ``v``, ``velocity``, ``score``.
        value: (B, ...) network output.
        x: (B, ...) the latents it was computed at.
        alpha: signal level, broadcastable.
        sigma: noise level, broadcastable.
    """
    if kind == "eps":
        return Prediction((x - sigma * value) / alpha, value)
    if kind == "x0":
        return Prediction(value, (x - alpha * value) / sigma)
    if kind == "v":
        norm = alpha**2 + sigma**2
        return Prediction((alpha * x - sigma * value) / norm, (sigma * x + alpha * value) / norm)
    if kind == "velocity":
        norm = alpha + sigma
        return Prediction((x - sigma * value) / norm, (x + alpha * value) / norm)
    if kind == "score":
        return predict("eps", -sigma * value, x, alpha, sigma)
    raise ValueError(f"unknown prediction kind {kind!r}: use eps, x0, v, velocity or score")


def express(kind: str, prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Inverse of :func:`predict`: write a prediction as the given kind."""
    faces = {
        "eps": lambda: prediction.eps,
        "x0": lambda: prediction.x0,
        "v": lambda: alpha * prediction.eps - sigma * prediction.x0,
        "velocity": lambda: prediction.velocity,
        "score": lambda: -prediction.eps / sigma,
    }
    if kind not in faces:
        raise ValueError(f"unknown prediction kind {kind!r}: use {', '.join(faces)}")
    return faces[kind]()


def ode_velocity(path: Path, prediction: Prediction, t: Time) -> Tensor:
    r"""Probability-flow velocity :math:`dx/dt = \alpha' X + \sigma' E` on this path."""
    alpha_rate, sigma_rate = path.rates(t)
    return alpha_rate * prediction.x0 + sigma_rate * prediction.eps


def from_ode_velocity(path: Path, value: Tensor, x: Tensor, t: Time) -> Prediction:
    r"""Inverse of :func:`ode_velocity`, with :math:`W = \alpha\sigma' - \alpha'\sigma`."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    alpha_rate, sigma_rate = path.rates(t)
    w = alpha * sigma_rate - alpha_rate * sigma
    return Prediction((sigma_rate * x - sigma * value) / w, (alpha * value - alpha_rate * x) / w)
