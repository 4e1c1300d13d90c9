r"""Pivotal inversion: embeddings learned step by step, so that guided sampling follows a pivot.

An inversion without guidance gives a trajectory :math:`z^*_0 \dots z^*_N`, the pivot; sampling at
guidance :math:`w` drifts off it. From :math:`\bar z_N = z^*_N` downwards, for each interval
:math:`k`, one half of the guidance is free: an embedding :math:`n_k`, the null prompt's for
null-text inversion, the prompt's own for prompt tuning. Adam looks for the one with which the
sampler arrives where the pivot is,

.. math::
    \ell(n) = \tfrac1{Chw}\,\lVert S_k(\bar z_{k+1}; n) - z^*_k\rVert_2^2, \qquad
    S_k = \alpha_k X_w + \sigma_k E_w,

and with that embedding the sampler goes on: :math:`\bar z_k = S_k(\bar z_{k+1}; n_k)`. The value
found starts the next interval, Adam's moments do not. The other half of the guidance does not
depend on n and is evaluated once an interval.

Each image of a batch has its own loss, its own Adam and its own stop, and images that are done
leave the batch of the network calls: a batch does and costs what its images do alone. As in the
published code, the iteration whose loss is below the limit still makes its Adam step.

Only the sequence embeddings are free (`embeds`); pooled embeddings and sizes (SDXL, SD3) stay those
of the prompt. Embeddings are optimised in float32 or better whatever the network computes in, and
float16 networks are refused: gradients of this loss vanish in that type. Weights get no gradients.

Cost of an interval: 1 evaluation of the fixed half, up to n of the free one, each with a backward
pass, and 1 to go on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.branches import Branch
from ..core.control import Control
from ..core.grid import Grid, Step
from ..core.model import Condition, Model, evaluate
from ..core.path import Prediction, levels
from ..core.progress import bar
from ..core.rows import along, mean_square
from ..core.state import Inversion
from ..errors import RetourError, check_finite, check_range
from .base import Job

logger = logging.getLogger(__name__)

LABEL = "embed"

Half = Literal["uncond", "cond"]


@dataclass(frozen=True)
class Plan:
    """How long and how fast to learn.

    Attributes:
        inner: most Adam steps in an interval.
        lr: Adam's learning rate in the noisiest interval.
        decay: part of it that is gone at the clean end; the fall is linear.
        stop: an image is done with an interval once its loss is below this limit,
        slack: which grows by that much with every interval.
    """

    inner: int
    lr: float
    decay: float = 0.5
    stop: float = 0.0
    slack: float = 0.0

    def __post_init__(self) -> None:
        check_range("inner_steps", self.inner, 0)
        for name in ("lr", "stop", "slack"):
            check_range(name, getattr(self, name), 0)
        check_range("decay", self.decay, 0, 1)

    def rate(self, step: Step) -> float:
        """Learning rate in an interval."""
        return self.lr * (1 - self.decay * step.position / step.count)

    def limit(self, step: Step) -> float:
        """Loss at which an image is done with an interval."""
        return self.stop + self.slack * step.position


@dataclass(frozen=True)
class Tuned:
    """What was learned.

    Attributes:
        embeds: (N, B, L, D), interval k's at index k.
        losses: (N, B, n + 1), after 0, 1, ... Adam steps; NaN beyond the last one made.
        states: (N+1, B, C, h, w) where the sampler went, clean first.
    """

    embeds: Tensor
    losses: Tensor
    states: Tensor


class Tuning:
    """A pivot, the sampler that shall follow it, and the half of its guidance that is free.

    Args:
        job: the inversion to do; its guidance is that of the sampler.
        grid: the grid of the pivot.
        pivot: (N+1, B, C, h, w) states, clean first.
        half: which embedding is learned, starting from the job's own.
        plan: how.

    Raises:
        RetourError: the network cannot be differentiated, see :func:`check_differentiable`.
    """

    def __init__(self, job: Job, grid: Grid, pivot: Tensor, half: Half, plan: Plan):
        check_differentiable(job.model)
        self.job, self.grid, self.pivot, self.plan = job, grid, pivot, plan
        self.half = half
        self.free, self.fixed = job.condition, job.negative
        if half == "uncond":
            self.free, self.fixed = self.fixed, self.free
        start = self.free.tensors["embeds"].detach()
        self.start = start.to(torch.promote_types(start.dtype, torch.float32))
        self.rule = job.denoiser(job.guidance).guidance

    def each_step(self) -> Tuned:
        """Learn an embedding for each interval."""
        x, embeds, found = self.pivot[-1], self.start, []
        with bar(self.grid.walk(down=True), self.grid.steps, LABEL) as steps:
            for step in steps:
                interval = Interval(self, step, x)
                embeds, history = interval.fit(embeds)
                x = interval.arrive(embeds)
                found.append((embeds, interval.record(history, x), x))
        return self._collect(found)

    def all_steps(self) -> Tuned:
        """Learn one embedding for all intervals, in as many Adam steps as `each_step` may make.

        Intervals start from the pivot, are taken in turns, and share one Adam at full rate.
        """
        intervals = [
            Interval(self, step, self.pivot[step.index + 1]) for step in self.grid.walk(down=True)
        ]
        leaves = [row.clone().requires_grad_() for row in self.start.split(1)]
        adam = torch.optim.Adam(leaves, lr=self.plan.lr)
        turns = [interval for interval in intervals * self.plan.inner if interval.acts]
        with bar(turns, len(turns), LABEL) as shown:
            for interval in shown:
                interval.descend(adam, leaves, range(len(leaves)))
        embeds, x, found = torch.cat(leaves).detach(), self.pivot[-1], []
        for step in self.grid.walk(down=True):
            interval = Interval(self, step, x)
            x = interval.arrive(embeds)
            found.append((embeds, interval.record([[] for _ in leaves], x), x))
        return self._collect(found)

    def _collect(self, found: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tuned:
        embeds, losses, states = zip(*found[::-1], strict=True)
        return Tuned(
            torch.stack(embeds), torch.stack(losses), torch.stack([*states, self.pivot[-1]])
        )


class Interval:
    """One interval of the way down from fixed latents, as a function of the free embedding.

    Attributes:
        acts: whether the embedding matters here at all.
    """

    def __init__(self, tuning: Tuning, step: Step, x: Tensor):
        self.tuning, self.step, self.x = tuning, step, x
        self.goal = tuning.pivot[step.index]
        guided = tuning.job.guidance != 1.0 and tuning.rule.active(step.t)
        self.acts = guided or tuning.half == "cond"
        self.fixed: Prediction | None = None
        if guided or not self.acts:
            self.fixed = self._ask(x, tuning.fixed)

    def _ask(self, x: Tensor, condition: Condition) -> Prediction:
        job = self.tuning.job
        return evaluate(job.model, x, self.step.t, condition, job.ledger)

    def arrive(self, embeds: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """Latents at the clean end, of all images or of some `rows`, given their embeddings."""
        rows = range(len(self.x)) if rows is None else rows
        x = self.x[list(rows)]
        prediction = self._predict(x, embeds, rows)
        alpha, sigma = levels(self.tuning.job.model.path, self.step.s, x)
        return alpha * prediction.x0 + sigma * prediction.eps

    def _predict(self, x: Tensor, embeds: Tensor, rows: Sequence[int]) -> Prediction:
        fixed = None if self.fixed is None else self.fixed.map(lambda face: face[list(rows)])
        if not self.acts:
            assert fixed is not None
            return fixed
        free = self._ask(x, self.tuning.free.take(rows).with_tensors(embeds=embeds))
        if fixed is None:
            return free
        cond, uncond = (fixed, free) if self.tuning.half == "uncond" else (free, fixed)
        scale = along(x.new_full((len(x),), self.tuning.job.guidance), x)
        return self.tuning.rule(cond, uncond, scale)

    def losses(self, arrived: Tensor, rows: Sequence[int]) -> Tensor:
        """Mean squared distance from the pivot, one for each of the `rows`."""
        return mean_square(arrived - self.goal[list(rows)])

    def descend(
        self, adam: torch.optim.Adam, leaves: Sequence[Tensor], rows: Sequence[int]
    ) -> list[float]:
        """One Adam step of the images `rows`; returns their losses before it."""
        active = [leaves[row] for row in rows]
        with torch.enable_grad():
            losses = self.losses(self.arrive(torch.cat(active), rows), rows)
            gradients = torch.autograd.grad(losses.sum(), active)
        check_finite(losses.detach(), "the losses", "load the model in float32, or lower lr")
        for leaf in leaves:
            leaf.grad = None  # Adam passes over an image that is done, and keeps its moments.
        for leaf, gradient in zip(active, gradients, strict=True):
            leaf.grad = gradient
        adam.step()
        values: list[float] = losses.tolist()
        return values

    def fit(self, embeds: Tensor) -> tuple[Tensor, list[list[float]]]:
        """Embeddings learned from `embeds` on, and each image's losses before each Adam step."""
        plan = self.tuning.plan
        history: list[list[float]] = [[] for _ in embeds]
        leaves = [row.clone().requires_grad_() for row in embeds.split(1)]
        adam = torch.optim.Adam(leaves, lr=plan.rate(self.step))
        rows = list(range(len(leaves))) if self.acts else []
        for _ in range(plan.inner if rows else 0):
            losses = self.descend(adam, leaves, rows)
            for row, loss in zip(rows, losses, strict=True):
                history[row].append(loss)
            rows = [row for row in rows if history[row][-1] >= plan.limit(self.step)]
            if not rows:
                break
        return torch.cat(leaves).detach(), history

    def record(self, history: Sequence[Sequence[float]], arrived: Tensor) -> Tensor:
        """(B, n + 1) losses, the last one being that of `arrived`, padded with NaN."""
        size = (len(history), self.tuning.plan.inner + 1)
        table = torch.full(size, torch.nan, dtype=torch.float64)
        last = self.losses(arrived, range(len(arrived))).tolist()
        for row, losses in enumerate(history):
            table[row, : len(losses) + 1] = table.new_tensor([*losses, last[row]])
        return table


def check_differentiable(model: Model) -> None:
    """Refuse to learn an embedding where gradients vanish or cannot be had.

    Raises:
        RetourError: the network computes in float16, or the caller forbids gradients for good.
    """
    if getattr(model, "dtype", None) == torch.float16:
        raise RetourError(
            f"model {model.name!r} computes in float16, in which the gradients of an embedding "
            "vanish: load it with dtype='float32'"
        )
    if torch.is_inference_mode_enabled():
        raise RetourError(
            "an embedding cannot be learned under torch.inference_mode: use torch.no_grad, or none"
        )


class PerStep(Control):
    """Base of the ways back of learned embeddings: says when the guidance is not theirs."""

    def __init__(self, inversion: Inversion):
        self.guidance_learned = inversion.guidance

    def embed(self, step: Step, branch: Branch) -> Branch:
        """The branch with the embeddings of that interval."""
        raise NotImplementedError

    def branches(self, step: Step, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """Give every branch its embeddings."""
        scales = {b.scale for b in branches if b.name == "source"} - {self.guidance_learned}
        if step.position == 0 and scales:
            logger.warning(
                "the embeddings were learned at guidance %g and are used at %g, where the source "
                "need not come back: invert with that guidance",
                self.guidance_learned,
                *scales,
            )
        return tuple(self.embed(step, branch) for branch in branches)
