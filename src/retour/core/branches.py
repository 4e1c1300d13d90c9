"""Branches: an editing run is one batch with named rows.

The *state* of a run stacks branches (``source``, ``target``, ...), each of B images. One network
call stacks the *rows* that those branches need: an unconditional row where a branch is guided, and
a conditional one. Controls address rows by name, never by index arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .guidance import CFG, Guidance
from .model import Condition, Ledger, Model, evaluate
from .path import Prediction, Time
from .rows import along


@dataclass(frozen=True)
class Branch:
    """One trajectory of a run, for B images.

    Attributes:
        name: how controls call it.
        condition: B prompts.
        uncond: B negative (or empty) prompts; not needed at scale 1.
        scale: guidance scale.
        auxiliary: carried for the others' sake (a layout branch), not a result of the run.
    """

    name: str
    condition: Condition
    uncond: Condition | None = None
    scale: float = 1.0
    auxiliary: bool = False

    @property
    def guided(self) -> bool:
        """Whether it needs an unconditional row."""
        return self.uncond is not None and self.scale != 1.0


@dataclass(frozen=True)
class Row:
    """Name of one row of a network call."""

    branch: str
    half: str
    image: int


class Rows(tuple[Row, ...]):
    """The names of all rows of one network call, in batch order."""

    def conditional(self) -> dict[tuple[str, int], int]:
        """Index of each conditional row, by branch and image."""
        return {(row.branch, row.image): i for i, row in enumerate(self) if row.half == "cond"}

    def where(self, branch: str | None = None, half: str | None = None) -> Tensor:
        """Indices (long) of the rows of that branch and half (``cond`` or ``uncond``)."""
        return torch.tensor(
            [
                i
                for i, row in enumerate(self)
                if branch in (None, row.branch) and half in (None, row.half)
            ],
            dtype=torch.long,
        )


@dataclass(frozen=True)
class Layout:
    """Where each branch lives in a stacked state of `len(names) * images` rows."""

    names: tuple[str, ...]
    images: int
    auxiliary: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> slice:
        k = self.names.index(name)
        return slice(k * self.images, (k + 1) * self.images)

    def split(self, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield `(branch name, its rows)`."""
        for name in self.names:
            yield name, x[self[name]]

    def replaced(self, x: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Stacked rows with those of some branches replaced; out of place."""
        return torch.cat([parts.get(name, part) for name, part in self.split(x)])

    def targets(self) -> tuple[str, ...]:
        """The branches whose ends are results: neither the source nor auxiliary ones."""
        return tuple(n for n in self.names if n != "source" and n not in self.auxiliary)


@dataclass(frozen=True)
class Plan:
    """What one network call evaluates: conditional rows last, in the state's order.

    Attributes:
        rows: names of the R rows.
        condition: their R conditions.
        reads: (R,) the state row that each of them reads.
    """

    rows: Rows
    condition: Condition
    reads: Tensor


class Denoiser:
    """A guided, counted denoiser over branches: `(x, t) -> Prediction`.

    The attribute `branches` may be replaced between steps (per-step embeddings, schedules). `rows`
    names the rows of the call in progress, for attention hooks; it is empty between calls. `latest`
    is the guided clean estimate of the last call (branches * B, C, h, w), for previews.
    """

    def __init__(
        self,
        model: Model,
        branches: Sequence[Branch],
        *,
        guidance: Guidance | None = None,
        ledger: Ledger | None = None,
    ):
        self.model = model
        self.branches = tuple(branches)
        self.guidance: Guidance = CFG() if guidance is None else guidance
        self.ledger = Ledger() if ledger is None else ledger
        self.rows = Rows()
        self.latest: Tensor | None = None
        self._planned: tuple[tuple[tuple[Branch, ...], bool], Plan] | None = None
        self._whole: Denoiser | None = None
        self._numbers: tuple[int, ...] | None = None

    @property
    def layout(self) -> Layout:
        """Layout of the state it expects."""
        names = tuple(b.name for b in self.branches)
        auxiliary = tuple(b.name for b in self.branches if b.auxiliary)
        return Layout(names, len(self.branches[0].condition), auxiliary)

    @property
    def kind(self) -> str:
        """What the network predicts; solvers that reuse its raw output need to know."""
        return self.model.prediction

    def only(self, *names: str) -> Denoiser:
        """A denoiser over some of the branches, counted on the same ledger."""
        kept = [b for b in self.branches if b.name in names]
        return Denoiser(self.model, kept, guidance=self.guidance, ledger=self.ledger)

    def part(self, images: Sequence[int]) -> Denoiser:
        """A denoiser of some of the images, for iterations that the others have finished.

        It is counted on the same ledger, and hooked as this one is: rows keep their images' names.
        """
        branches = [
            replace(
                b,
                condition=b.condition.take(images),
                uncond=None if b.uncond is None else b.uncond.take(images),
            )
            for b in self.branches
        ]
        part = Denoiser(self.model, branches, guidance=self.guidance, ledger=self.ledger)
        part._whole, part._numbers = self, tuple(images)
        return part

    def plan(self, t: Time) -> Plan:
        """What a call at `t` evaluates; kept as long as the branches stay the same."""
        key = (self.branches, any(self._active(t)))
        if (
            self._planned is None
            or self._planned[0][0] is not key[0]
            or self._planned[0][1] != key[1]
        ):
            self._planned = key, self._make_plan(key[1])
        return self._planned[1]

    def _active(self, t: Time) -> list[bool]:
        times = t.tolist() if isinstance(t, Tensor) else [t]
        return [self.guidance.active(time) for time in times]

    def _make_plan(self, active: bool) -> Plan:
        halves = [
            ("uncond", b.uncond, k) for k, b in enumerate(self.branches) if b.guided and active
        ]
        halves += [("cond", b.condition, k) for k, b in enumerate(self.branches)]
        images = self.layout.images
        numbers = range(images) if self._numbers is None else self._numbers
        rows = Rows(Row(self.branches[k].name, half, n) for half, _, k in halves for n in numbers)
        reads = torch.tensor([k * images + i for _, _, k in halves for i in range(images)])
        condition = Condition.cat([c for _, c, _ in halves if c is not None])
        return Plan(rows, condition, reads)

    def __call__(self, x: Tensor, t: Time) -> Prediction:
        """Guided prediction for the stacked state `x` (branches * B, C, h, w).

        Args:
            x: the state.
            t: its path time, or (branches * B,) one for each row.
        """
        plan = self.plan(t)
        watched = self if self._whole is None else self._whole
        watched.rows = plan.rows
        try:
            times = t[plan.reads.to(t.device)] if isinstance(t, Tensor) else t
            reads = x[plan.reads.to(x.device)]
            raw = evaluate(self.model, reads, times, plan.condition, self.ledger)
        finally:
            # Hooks must not take another denoiser's call on the same network for this one's.
            watched.rows = Rows()
        guided = raw.map(lambda face: face[len(plan.rows) - len(x) :])
        if len(plan.rows) != len(x):
            guided = self._combine(plan.rows, raw, guided, x, self._active(t))
        self.latest = guided.x0.detach()
        return guided

    def _combine(
        self, all_rows: Rows, raw: Prediction, cond: Prediction, x: Tensor, active: list[bool]
    ) -> Prediction:
        on = along(torch.tensor(active, device=x.device).expand(len(x)), x)
        x0, eps = [], []
        for branch in self.branches:
            part = self.layout[branch.name]
            guided = cond.map(lambda face, part=part: face[part])
            if branch.guided:
                rows = all_rows.where(branch.name, "uncond").to(x.device)
                uncond = raw.map(lambda face, rows=rows: face[rows])
                scale = torch.where(on[part], x.new_tensor(branch.scale), x.new_tensor(1.0))
                guided = self.guidance(guided, uncond, scale)
            x0.append(guided.x0)
            eps.append(guided.eps)
        return Prediction(torch.cat(x0), torch.cat(eps))


class Wrapped:
    """A denoiser whose predictions are rewritten: energies, virtual inversion, extra guidance.

    Wrapped denoisers nest. `model` and `ledger` are the inner one's, for further evaluations.

    Args:
        inner: the denoiser to ask.
        rule: (prediction, x, t) -> prediction, for the stacked state `x` (rows, C, h, w).
    """

    def __init__(
        self,
        inner: Denoiser | Wrapped,
        rule: Callable[[Prediction, Tensor, float], Prediction],
    ):
        self.inner, self.rule = inner, rule

    @property
    def kind(self) -> str:
        """What the network behind it predicts."""
        return self.inner.kind

    @property
    def model(self) -> Model:
        """The model behind it, hooked if the run is."""
        return self.inner.model

    @property
    def ledger(self) -> Ledger:
        """Where evaluations are counted."""
        return self.inner.ledger

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches of the step in progress."""
        return self.inner.branches

    def __call__(self, x: Tensor, t: float) -> Prediction:
        """The rewritten prediction."""
        return self.rule(self.inner(x, t), x, t)


def rescale(branches: Sequence[Branch], **scales: float) -> tuple[Branch, ...]:
    """Return branches with some guidance scales replaced, by name."""
    return tuple(replace(b, scale=scales.get(b.name, b.scale)) for b in branches)
