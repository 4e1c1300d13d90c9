r"""RF-Edit: in the noisiest steps the target attends to the source's own values.

The paper inverts with RF-Solver and keeps, in the last :math:`n` steps of the way up, the values
:math:`V` (after projection, all heads) of the last attention layers, for both network calls of a
step; in the first :math:`n` steps of the way down the target's are replaced by them. Its queries
and keys stay its own, so it looks where the target prompt says and finds there what the source has.

What was kept belongs to an interval and to a call within it. In the paper's code the first call's
values are those of the interval's *clean* end, where the way up departs, and are read at its noisy
end, where the way down departs (``features="inversion"``, the default here). ``"matched"`` takes
them where they are read: from the source's step down over the same interval, from the inverted
track. The second calls, in the middle, agree in both up to the solver's error.

FireFlow's code shares queries or keys as well, adds what was kept to the target's own instead of
replacing it, and weighs it when it is kept (`strategy`, `ratio`); it goes with its own solver
(``--inverter fireflow``).

The published `inject` runs from 2 steps (adding) over 3 (replacing) to 5 (style) of 15 to 30, and
is 20 of 25 where the script is given none: 0.2 is 3 of 15. More keeps more and edits less.

Where we deviate: an inversion is a value that can be stored and edited many times, and :math:`2n M`
tensors of L tokens are not part of it. Before each of the n steps the source's one step is taken
again, from its stored state, by the same solver and so with the same numbers; only that step's
values are kept, for that step. "The last 18 of 38 single blocks" is a share of the attention layers
of the network's last stack, and of the self-attention layers of a UNet. Where classifier-free
guidance runs an unconditional row, its values are replaced as well: else guidance would multiply
the difference that the replacement makes. With solvers whose two directions call the network
differently, a call takes the values of the unused call whose time lies nearest along its step.

Cost: the sampler's, and the inverter's cost of n steps (RF-Solver: 2n).

References: Wang et al., "Taming Rectified Flow for Inversion and Editing", ICML 2025, arXiv
2411.04746; Deng et al., "FireFlow: Fast Inversion of Rectified Flow for Image Semantic Editing",
ICML 2025, arXiv 2412.07517.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..attention.control import AttentionCall, AttentionControl
from ..attention.hooks import hooked
from ..core.branches import Branch, Denoiser, Layout, Wrapped
from ..core.control import Control
from ..core.grid import Step, part_of
from ..core.model import AttentionSite, Ledger, Model
from ..core.path import Path, Prediction
from ..core.registry import register
from ..core.solver import Solver
from ..core.state import Inversion
from ..errors import check_range
from ..inverters.base import way_back
from ..solvers._flow import clock
from ..solvers.runge_kutta import RF_SOLVER_PAPER
from .base import EditJob, Editor

Asked: TypeAlias = Denoiser | Wrapped
Values: TypeAlias = dict[str, Tensor]
Turn: TypeAlias = tuple[float, Values]
Strategy: TypeAlias = Literal["replace_v", "add_v", "replace_k", "add_k", "replace_q", "add_q"]


@dataclass(frozen=True)
class RFEditOptions:
    """Options of RF-Edit.

    Attributes:
        inject: fraction of the steps, from noise, in which values are shared.
        blocks: share of the last stack's attention layers, from its end, that share; at least one
            layer if above 0.
        features: whose values: those of the way up, or those of a step down, see the module.
        tokens: share what all tokens have, text included, or the image's only.
        strategy: what is shared, and whether it replaces the target's own or is added to it.
        ratio: weight of what is shared.
    """

    inject: float = 0.2
    blocks: float = 18 / 38
    features: Literal["inversion", "matched"] = "inversion"
    tokens: Literal["all", "image"] = "all"
    strategy: Strategy = "replace_v"
    ratio: float = 1.0

    def __post_init__(self) -> None:
        check_range("inject", self.inject, 0, 1)
        check_range("blocks", self.blocks, 0, 1)
        check_range("ratio", self.ratio, 0)


@register(
    "rf-edit",
    task="edit",
    summary="in the noisiest steps the target attends to the source's values",
    paper=RF_SOLVER_PAPER,
    options=RFEditOptions,
    nfe="2N + n",
    needs={"attention"},
    requires={"trajectory"},
    mate="rf-solver",
)
class RFEdit(Editor):
    """Value sharing between the source's step and the target's."""

    def __init__(self, options: RFEditOptions | None = None):
        self.options = RFEditOptions() if options is None else options

    def control(self, job: EditJob) -> Control:
        """The sharing of this job."""
        return Sharing(job, self.options)


def last_layers(model: Model, share: float) -> frozenset[str]:
    """Names of the last attention layers, in which image tokens attend to image tokens."""
    sites = [s for s in model.attention_sites() if s.kind in ("self", "joint")]
    stack = [s.name for s in sites if _stack(s) == _stack(sites[-1])]
    count = max(1, round(share * len(stack))) if share > 0 else 0
    return frozenset(stack[len(stack) - count :])


def _stack(site: AttentionSite) -> str:
    return site.name.split(".")[0] if site.place == "block" else ""


def along(step: Step, path: Path, t: float) -> float:
    """How far along a step the time `t` is: 0 where it departs, 1 where it arrives."""
    a, b = clock(path, step.t), clock(path, step.s)
    return (clock(path, t) - a) / (b - a)


class Keeper(AttentionControl):
    """Keeps the values (or queries, or keys) of each call of a source step.

    Attributes:
        turns: for each call, how far along the step it was made, and its values by layer.
    """

    def __init__(self, sites: frozenset[str], step: Step, path: Path, which: int = 2):
        self.sites, self.step, self.path, self.which = sites, step, path, which
        self.turns: list[Turn] = []

    def wants(self, site: AttentionSite) -> bool:
        """The chosen layers."""
        return site.name in self.sites

    def qkv(
        self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keep the conditional rows' values."""
        if not self.turns or call.site.name in self.turns[-1][1]:
            self.turns.append((along(self.step, self.path, call.t), {}))
        kept = (q, k, v)[self.which].detach()
        self.turns[-1][1][call.site.name] = kept[call.rows.where(half="cond").to(kept.device)]
        return q, k, v


class Giver(AttentionControl):
    """Puts given values in the place of the targets' own, or adds them.

    Attributes:
        which: 0 for queries, 1 for keys, 2 for values.
        values: what is given, by layer.
    """

    def __init__(self, sites: frozenset[str], options: RFEditOptions):
        self.sites, self.options = sites, options
        self.add, self.which = options.strategy.startswith("add"), "qkv".index(options.strategy[-1])
        self.values: Values = {}

    def wants(self, site: AttentionSite) -> bool:
        """The chosen layers."""
        return site.name in self.sites

    def active(self, call: AttentionCall) -> bool:
        """While there is something to give."""
        return call.site.name in self.values

    def qkv(
        self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Change them in all rows but the source's."""
        rows = [i for i, row in enumerate(call.rows) if row.branch != "source"]
        parts = [q, k, v]
        own = parts[self.which]
        given = self.values[call.site.name][[call.rows[i].image for i in rows]].to(own)
        given = self.options.ratio * given + (own[rows] if self.add else 0)
        if self.options.tokens == "image":
            given = torch.slice_scatter(
                own[rows], given[..., call.image, :], -2, call.image.start, call.image.stop
            )
        index = torch.tensor(rows, device=own.device)
        parts[self.which] = own.index_copy(0, index, given)
        return parts[0], parts[1], parts[2]


class Sharing(Control):
    """Takes the source's step anew before each shared step, and hands out its values."""

    def __init__(self, job: EditJob, options: RFEditOptions):
        self.job, self.options = job, options
        self.count = part_of(options.inject, job.grid.steps)
        self.sites = last_layers(job.model, options.blocks)
        self.giver = Giver(self.sites, options)

    @cached_property
    def solver(self) -> Solver:
        """The inverter's own."""
        return way_back(self.job.inversion).solver

    def attention(self) -> Sequence[AttentionControl]:
        """What gives, if anything is given at all."""
        return (self.giver,) if self.count and self.sites else ()

    def denoiser(self, step: Step, denoise: Asked, layout: Layout) -> Asked:
        """One whose calls find the values of their counterparts."""
        if step.position >= self.count or not self.sites:
            return denoise
        return Informed(denoise, step, self.source_step(step, denoise.ledger), self.giver)

    def source_step(self, step: Step, ledger: Ledger) -> list[Turn]:
        """Take the source's step over the same interval; return what its calls had."""
        job, inversion = self.job, self.job.inversion
        up = self.options.features == "inversion"
        place = step.index if up else step.index + 1
        ends = (step.clean, step.noisy) if up else (step.noisy, step.clean)
        taken = Step(step.index, step.count, *ends, not up)
        state = inversion.at(place).map(lambda v: v.to(job.model.device))
        keeper = Keeper(self.sites, taken, job.model.path, self.giver.which)
        source = Denoiser(job.model, [_source(inversion)], ledger=ledger)
        with hooked(source, [keeper]):
            self.solver.step(source, state, taken, job.model.path)
        return keeper.turns


def _source(inversion: Inversion) -> Branch:
    """The source as the inversion asked about it."""
    scale = inversion.options.get("inversion_guidance", 1.0)
    scale = inversion.guidance if scale is None else scale
    told = inversion.options.get("inversion_embedded", 1.0)
    given, negative = inversion.condition.told(told), inversion.negative.told(told)
    return Branch("source", given, negative, scale)


class Informed(Wrapped):
    """Before each call, gives the values of the unused turn that lies nearest along the step."""

    def __init__(self, inner: Asked, step: Step, turns: Sequence[Turn], giver: Giver):
        super().__init__(inner, lambda prediction, x, t: prediction)
        self.step, self.turns, self.giver = step, list(turns), giver

    def __call__(self, x: Tensor, t: float) -> Prediction:
        """The prediction with shared values."""
        place = along(self.step, self.model.path, t)
        turn = min(self.turns, key=lambda turn: abs(turn[0] - place), default=None)
        if turn is None:
            return self.inner(x, t)
        self.turns = [other for other in self.turns if other is not turn]
        self.giver.values = turn[1]
        try:
            return self.inner(x, t)
        finally:
            self.giver.values = {}
