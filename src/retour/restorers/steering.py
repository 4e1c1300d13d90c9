r"""Steering a run by a cost on its clean estimate, without a gradient through the network.

At every step the network's answer is read as a flow velocity that is then held, :math:`\hat x_0 =
y - u v` in flow coordinates (see :mod:`retour.core.path`). With :math:`v` held, the gradient of a
cost :math:`L(\hat x_0)` with respect to the state is the gradient with respect to the estimate:

.. math:: y \leftarrow y - \eta\,\nabla_{\hat x_0} L(\hat x_0), \qquad
          y_s = y + (u_s - u_t)\, v,

the *same* velocity crossing the interval ("gradient skipping": the factor :math:`(I - u
\partial_y v)^\top` of the true gradient is dropped). Moving the state by :math:`\delta` with the
velocity held moves both faces of the prediction by :math:`\delta`, which is how it is done here:
the solver's own first-order step then is the steered one, on every path.

The step size. The published constants belong to costs averaged over all elements and so to one
picture size. Here :math:`\eta = \kappa / \Lambda`, with :math:`\Lambda` the cost's largest
curvature, so :math:`\kappa` is the part of the error that one step removes where the cost is
steepest: 1 removes it, 2 and more diverges. The published 500 on a mean over 3 x 64 x 64 pixels is
:math:`\kappa = 2 \cdot 500 / 12288 = 0.081`, for each of its operators. A cost without a known
curvature (a classifier's) gets a normalised step instead: its root mean square is :math:`\kappa`,
whatever the cost's scale.

With `again` the network is asked anew at the moved state, whose estimate is moved again, before the
interval is crossed with the last answer: what a move makes impossible elsewhere (a hole's border,
say) is answered by the network and not left to the next level. The paper asks once; its code for
rectified diffusion models asks a second time after the move.

Reference: Patel et al., "Steering Rectified Flow Models in the Vector Field for Controlled Image
Generation", 2024, arXiv 2412.00100 (ICCV 2025 as "FlowChef").
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.branches import Denoiser, Layout, Wrapped
from ..core.control import Control
from ..core.grid import Step
from ..core.model import Model
from ..core.path import Prediction, levels
from .operators import Operator

Gradient = Literal["skip", "full"]
POWER_STEPS = 6
PROBE = 1e-2


class Cost(ABC):
    """A cost of clean latents.

    Attributes:
        curvature: (B, 1, 1, 1) or a number: the largest eigenvalue of its Hessian; None if unknown.
    """

    curvature: Tensor | float | None = None

    @abstractmethod
    def __call__(self, x0: Tensor) -> Tensor:
        """Clean latents (B, C, h, w) -> costs (B,), differentiable."""


class Distance(Cost):
    r""":math:`\tfrac12 \sum w (x_0 - z)^2`: stay near latents `z`.

    Args:
        z: (B, C, h, w) latents.
        weight: broadcastable, in [0, 1]; where they count.
    """

    curvature = 1.0

    def __init__(self, z: Tensor, weight: Tensor | float = 1.0):
        self.z, self.weight = z, weight

    def __call__(self, x0: Tensor) -> Tensor:
        """Weighted squared distance."""
        return (self.weight * (x0 - self.z) ** 2).flatten(1).sum(1) / 2


class Measurement(Cost):
    r""":math:`\tfrac12 |A D(x_0) - y|^2`, with the model's decoder :math:`D`.

    The curvature, :math:`\|A \, \partial D\|^2`, is found by power iteration at the latents of what
    the measurement looks like; it asks the decoder, not the network.

    Args:
        model: whose decoder.
        operator: what happened.
        observed: (B, ...) measurements.
    """

    def __init__(self, model: Model, operator: Operator, observed: Tensor):
        self.model, self.operator, self.observed = model, operator, observed
        with torch.no_grad():
            start = model.encode(operator.guess(observed).clamp(-1, 1))
        self.curvature = largest_curvature(self.project, start)

    def project(self, x0: Tensor) -> Tensor:
        """What would be measured, in the measurements' dtype."""
        return self.operator.forward(self.model.decode(x0).to(self.observed))

    def __call__(self, x0: Tensor) -> Tensor:
        """Squared distance to the measurements."""
        return (self.project(x0) - self.observed).flatten(1).square().sum(1) / 2


class Classified(Cost):
    r""":math:`-\log p(c \mid D(x_0))` of any differentiable classifier of pictures.

    Args:
        model: whose decoder.
        logits: pictures (B, 3, H, W) in [-1, 1] -> (B, classes).
        label: (B,) classes, or one for all.
    """

    def __init__(self, model: Model, logits: Callable[[Tensor], Tensor], label: Tensor | int):
        self.model, self.logits, self.label = model, logits, torch.as_tensor(label)

    def __call__(self, x0: Tensor) -> Tensor:
        """Cross-entropy."""
        logits = self.logits(self.model.decode(x0))
        label = self.label.to(logits.device).expand(len(logits))
        return F.cross_entropy(logits, label, reduction="none")


def largest_curvature(linear: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Estimate the squared spectral norm of `linear`'s derivative at each row of `x`.

    Args:
        linear: differentiable, row by row.
        x: (B, C, h, w).

    Returns:
        (B, 1, 1, 1); a lower bound that power iteration brings close.
    """
    axes = tuple(range(1, x.ndim))

    def unit(v: Tensor) -> Tensor:
        return v / v.square().sum(axes, keepdim=True).sqrt()

    generator = torch.Generator().manual_seed(0)
    v = torch.randn(x.shape[1:], generator=generator, dtype=x.dtype).to(x.device).expand_as(x)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        here = linear(leaf)
        for _ in range(POWER_STEPS):
            v = unit(v)
            with torch.no_grad():
                ahead = (linear(x + PROBE * v) - here) / PROBE
            v = torch.autograd.grad(here, leaf, ahead, retain_graph=True)[0]
    return v.square().sum(axes, keepdim=True).sqrt()


class Steer(Control):
    """Steers the branches that `costs` names.

    Args:
        costs: branch name -> cost of its B images; or a function of the step that gives them.
        kappa: size of a step, see the module.
        inner: steps of descent on the cost for one answer of the network.
        free: number of last (cleanest) steps that are left alone.
        again: how often the network is asked anew at the moved state in a step.
        gradient: ``skip`` holds the velocity; ``full`` differentiates through the network (DPS),
            once a step.
    """

    def __init__(
        self,
        costs: Mapping[str, Cost] | Callable[[Step], Mapping[str, Cost]],
        kappa: float,
        *,
        inner: int = 1,
        free: int = 0,
        again: int = 0,
        gradient: Gradient = "skip",
    ):
        self.costs = costs if callable(costs) else lambda step: costs
        self.kappa, self.inner, self.free, self.gradient = kappa, inner, free, gradient
        self.again = again

    def denoiser(
        self, step: Step, denoise: Denoiser | Wrapped, layout: Layout
    ) -> Denoiser | Wrapped:
        """The denoiser with its predictions moved."""
        costs = self.costs(step)
        if step.index < self.free or not costs or self.kappa == 0:
            return denoise
        return _Steered(denoise, self, costs, layout)

    def descend(self, costs: Mapping[str, Cost], x0: Tensor, layout: Layout) -> Tensor:
        """Move of the clean estimate (rows, C, h, w) that `inner` steps of descent make."""
        move = torch.zeros_like(x0)
        for _ in range(self.inner):
            with torch.enable_grad():
                leaf = (x0 + move).detach().requires_grad_()
                gradient = self.gradients(costs, leaf, leaf, layout)
            move = move - gradient
        return move

    def gradients(
        self, costs: Mapping[str, Cost], x0: Tensor, leaf: Tensor, layout: Layout
    ) -> Tensor:
        """Scaled gradients of the costs of `x0` with respect to `leaf`; zero for other branches."""
        parts = dict(layout.split(x0))
        total = torch.stack([cost(parts[name]).sum() for name, cost in costs.items()]).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
        scaled = [
            self._scaled(costs[name], part) if name in costs else torch.zeros_like(part)
            for name, part in layout.split(gradient)
        ]
        return torch.cat(scaled)

    def _scaled(self, cost: Cost, gradient: Tensor) -> Tensor:
        if cost.curvature is not None:
            return self.kappa / cost.curvature * gradient
        size = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
        return self.kappa * gradient / size.clamp_min(torch.finfo(gradient.dtype).tiny)


class _Steered(Wrapped):
    """A denoiser whose predictions are those of the moved state, its velocity held."""

    def __init__(
        self,
        inner: Denoiser | Wrapped,
        steer: Steer,
        costs: Mapping[str, Cost],
        layout: Layout,
    ):
        super().__init__(inner, self._rule)
        self.steer, self.costs, self.layout = steer, costs, layout

    def _rule(self, prediction: Prediction, x: Tensor, t: float) -> Prediction:
        move = self.steer.descend(self.costs, prediction.x0, self.layout)
        alpha, sigma = levels(self.model.path, t, x)
        for _ in range(self.steer.again):
            x = x + (alpha + sigma) * move
            with torch.no_grad():
                prediction = self.inner(x, t)
            move = self.steer.descend(self.costs, prediction.x0, self.layout)
        return prediction.map(lambda face: face + move)

    def __call__(self, x: Tensor, t: float) -> Prediction:
        """The moved prediction."""
        if self.steer.gradient == "skip":
            with torch.no_grad():
                prediction = self.inner(x, t)
            return self._rule(prediction, x, t)
        return self._through_network(x, t)

    def _through_network(self, x: Tensor, t: float) -> Prediction:
        alpha, sigma = levels(self.model.path, t, x)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            prediction = self.inner(leaf, t)
            gradient = self.steer.gradients(self.costs, prediction.x0, leaf, self.layout)
        # The state's flow coordinate y = x / (alpha + sigma) is what moves.
        move = -gradient * (alpha + sigma)
        return prediction.map(lambda face: face.detach() + move)
