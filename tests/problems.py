r"""Analytic models with exact answers.

Data is a mixture of isotropic Gaussians, :math:`\sum_k w_k N(m_k, q_k^2 I)`. On every noise path
its best denoiser is known in closed form; with one component so is the probability flow:

.. math:: x_s = \alpha_s m + (x_t - \alpha_t m) \sqrt{V_s / V_t}, \quad V = \alpha^2 q^2 + \sigma^2.

The mixture's flow is found by classical Runge-Kutta of order 4 with many steps. "Prompts" choose
components by name, so that guidance, branches and editing run on these models too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from retour.core.grid import Grid, discrete_grid, flow_grid, lambda_grid
from retour.core.model import AttentionSite, Condition, FeatureSite, Tokens, Word
from retour.core.path import (
    CosinePath,
    DiscreteVP,
    FlowPath,
    LinearVP,
    Path,
    Prediction,
    SubVP,
    VEPath,
    betas,
    express,
    levels,
)

ABSENT = -60.0  # log weight of a component that a prompt leaves out: e-26, invisible in float64


def stable_diffusion_path() -> DiscreteVP:
    """The 1000-level table of SD 1.x."""
    return DiscreteVP(torch.cumprod(1 - betas("scaled_linear", 0.00085, 0.012, 1000), 0))


PATHS: dict[str, Path] = {
    "flow": FlowPath(),
    "vp": LinearVP(),
    "sub-vp": SubVP(),
    "cosine": CosinePath(),
    "ve": VEPath(),
    "discrete": stable_diffusion_path(),
}


@dataclass(frozen=True)
class Mixture:
    """Gaussian mixture: K names, weights (K,), means (K, C, h, w) or broadcastable, widths (K,)."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    means: Tensor
    widths: tuple[float, ...]

    def log_weights(self, prompt: str = "") -> Tensor:
        """(K,) log weights given a prompt: the named components, or all if it names none."""
        words = prompt.lower().split()
        logs = torch.tensor(self.weights, dtype=torch.float64).log()
        named = torch.tensor([name in words for name in self.names])
        return torch.where(named, logs, ABSENT) if bool(named.any()) else logs

    def predict(self, x: Tensor, alpha: Tensor, sigma: Tensor, logs: Tensor) -> Prediction:
        """Both faces of the best prediction; regular at both ends. `logs` is (R, K)."""
        means = self.means.to(x.dtype)
        q2 = torch.tensor(self.widths, dtype=x.dtype).square().reshape(-1, 1, 1, 1, 1)
        variance = alpha**2 * q2 + sigma**2  # (K, 1 or R, 1, 1, 1)
        gap = x - alpha * means[:, None]  # (K, R, C, h, w)
        size = gap[0, 0].numel()
        fit = -(gap**2).sum((2, 3, 4), keepdim=True) / (2 * variance) - size / 2 * variance.log()
        share = torch.softmax(logs.to(x.dtype).T.reshape(*fit.shape) + fit, 0)
        x0 = (share * (means[:, None] + alpha * q2 * gap / variance)).sum(0)
        return Prediction(x0, (share * sigma * gap / variance).sum(0))


def gaussian(channels: int = 2) -> Mixture:
    """One component, off centre."""
    mean = torch.linspace(0.6, -0.4, channels, dtype=torch.float64).reshape(1, -1, 1, 1)
    return Mixture(("thing",), (1.0,), mean, (0.5,))


def mixture() -> Mixture:
    """Three overlapping components in the plane: smooth flow, nothing symmetric."""
    means = torch.tensor([[1.0, 0.2], [-0.8, 0.7], [0.1, -1.0]], dtype=torch.float64)
    names = ("red", "green", "blue")
    return Mixture(names, (0.5, 0.3, 0.2), means.reshape(3, 2, 1, 1), (0.5, 0.6, 0.45))


def pictures(size: int = 8) -> Mixture:
    """Three flat colours as (3, size, size) pictures in [-1, 1], for whole-API runs."""
    means = torch.tensor([[0.7, -0.6, -0.6], [-0.6, 0.6, -0.5], [-0.6, -0.5, 0.7]])
    means = means.double().reshape(3, 3, 1, 1).expand(3, 3, size, size)
    return Mixture(("red", "green", "blue"), (0.4, 0.3, 0.3), means, (0.3, 0.3, 0.3))


@dataclass
class ProblemModel:
    """A generative model (`retour.core.model.Model`) whose network is exact.

    Attributes:
        data: the mixture.
        path: noise path.
        prediction: what the "network" returns: eps, x0, v, velocity or score.
        rounding: dtype that the output is rounded to, as a half-precision network's is.
        calls: network calls so far.
    """

    data: Mixture
    path: Path
    prediction: str = "eps"
    rounding: torch.dtype | None = None
    name: str = "problem"
    capabilities: frozenset[str] = frozenset({"gradients", "image"})
    native: int = 8
    multiple: int = 1
    train_steps: int = 1000
    default_steps: int = 10
    default_guidance: float = 3.0
    calls: int = field(default=0, compare=False)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides its answers."""
        facts = (self.data.names, self.data.weights, self.data.widths, self.data.means.tolist())
        text = repr((facts, self.path.name, self.prediction, str(self.rounding)))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def encode(self, images: Tensor) -> Tensor:
        return images.to(torch.float64)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.to(torch.float32)

    def embed(self, prompts: Sequence[str], *, size: tuple[int, int] | None = None) -> Condition:
        logs = torch.stack([self.data.log_weights(p) for p in prompts])
        return Condition({"embeds": logs[:, None]}, tuple(prompts))

    def tokens(self, prompt: str) -> Tokens:
        words = prompt.split()
        ids = tuple(1 + self.data.names.index(w) if w in self.data.names else 0 for w in words)
        return Tokens(ids, tuple(Word(w, (i,)) for i, w in enumerate(words)))

    def network(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.calls += 1
        x = x.to(torch.float64)
        alpha, sigma = levels(self.path, t, x)
        exact = self.data.predict(x, alpha, sigma, condition.tensors["embeds"][:, 0])
        raw = express(self.prediction, exact, alpha, sigma)
        return raw if self.rounding is None else raw.to(self.rounding).to(torch.float64)

    def grid(self, steps: int, *, size: tuple[int, int] | None = None) -> Grid:
        if isinstance(self.path, DiscreteVP):
            return discrete_grid(steps, self.train_steps, offset=1)
        if isinstance(self.path, FlowPath):
            return flow_grid(steps)
        return lambda_grid(self.path, steps, 1e-3, self.path.t_noise)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 3, height, width

    def attention_sites(self) -> list[AttentionSite]:
        return []

    def feature_sites(self) -> list[FeatureSite]:
        return []


def exact_flow(data: Mixture, path: Path, x: Tensor, t: float, s: float) -> Tensor:
    """Probability flow from `t` to `s` of a one-component mixture."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = levels(path, t, x), levels(path, s, x)
    q2 = data.widths[0] ** 2
    spread = ((alpha_s**2 * q2 + sigma_s**2) / (alpha_t**2 * q2 + sigma_t**2)).sqrt()
    return alpha_s * data.means + (x - alpha_t * data.means) * spread


def reference_flow(data: Mixture, path: Path, x: Tensor, t: float, s: float) -> Tensor:
    """Probability flow from `t` to `s` of any mixture, to about 1e-11."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = levels(path, t, x), levels(path, s, x)
    u_t, u_s = float(path.flow_time(t)), float(path.flow_time(s))
    return _runge_kutta(data, x / (alpha_t + sigma_t), u_t, u_s) * (alpha_s + sigma_s)


def _runge_kutta(data: Mixture, y: Tensor, a: float, b: float, steps: int = 600) -> Tensor:
    logs = data.log_weights().expand(len(y), -1)
    h = (b - a) / steps

    def slope(y: Tensor, u: float) -> Tensor:
        # Both ends are met as a + k h, which rounding may carry past 0 or 1.
        u_ = torch.tensor(min(max(u, 0.0), 1.0), dtype=y.dtype)
        return data.predict(y, 1 - u_, u_, logs).velocity

    for k in range(steps):
        u = a + k * h
        k1 = slope(y, u)
        k2 = slope(y + h / 2 * k1, u + h / 2)
        k3 = slope(y + h / 2 * k2, u + h / 2)
        k4 = slope(y + h * k3, u + h)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y


def points(count: int = 4, seed: int = 0) -> Tensor:
    """`count` standard normal points of the plane as latents (count, 2, 1, 1), float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 1, 1, generator=generator, dtype=torch.float64)


@lru_cache(maxsize=32)
def mixture_pair(name: str, t_clean: float, t_noise: float) -> tuple[Tensor, Tensor]:
    """`(clean, noisy)` ends of exact trajectories of :func:`mixture` on the named path."""
    path, data = PATHS[name], mixture()
    noisy = path.sigma(t_noise) * points() + path.alpha(t_noise) * data.means.mean(0)
    return reference_flow(data, path, noisy, t_noise, t_clean), noisy
