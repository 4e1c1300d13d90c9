r"""pix2pix-zero: an edit direction in text space, while text attention is held to the source's.

The target's condition is the source's plus an edit direction, the mean embedding of sentences with
the new word less the mean with the old one,

.. math:: c_{edit} = c_{src} + \bar c(\text{target sentences}) - \bar c(\text{source sentences});

without sentences these are the two prompts themselves, so :math:`c_{edit}` is the target prompt's.
Before each step the target's latents move down the gradient of how far its text attention M is from
that of the reconstruction at the same time:

.. math::
    L(x_t) = \sum_{layers} \operatorname{mean}_{heads} \sum_{pixels, tokens}
        \big(M(x_t, c_{edit}) - M^{ref}\big)^2, \qquad x_t \leftarrow x_t - \lambda \nabla L

*Reference maps.* The published code reconstructs first and stores every map of every step, then
edits. Here the reconstruction is the run's source branch: it takes the same steps from the same
noise, is never touched by the edit, and so has the same maps; at each step they are read when they
are needed and forgotten, T times less memory. With Direct Inversion, which corrects that
reconstruction, the published protocol also gives the target the source's offsets: that is its
option ``target_too=True``.

*Guidance.* The negative prompt is the source's caption, as published (``negative="source"``): the
prediction is pushed from the caption towards the edit, and the source branch, whose two halves are
then one, reconstructs without guidance. Against a caption the edit's own guidance oversaturates
(see :mod:`retour.editors.proximal`), so targets are pushed at :math:`1 + p\,(w - 1)`, p = 0.25;
``push=1`` is as published. Do not combine that with offsets that were stored for a
guided source (``form="two-pass"``): ``negative="inversion"`` keeps both as they were.

Where we deviate: as in the paper there is one :math:`x_t`, moved by the conditional row's gradient.
The published code keeps a copy for each half, moves each by its own half's loss, and goes on with
the unconditional one; its mean also runs over both halves, so its steps are half as long.
``halves="both"`` lets both halves' losses move our one :math:`x_t`, averaged. Transformers with
joint attention: M is the block of image queries and text keys.

Cost: 5N evaluations for one target (6N with a guided source) and N gradients through one of them.

Reference: Parmar et al., "Zero-shot Image-to-Image Translation", SIGGRAPH 2023, arXiv 2302.03027.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..core.branches import Branch, Denoiser, Layout, Wrapped
from ..core.control import Control
from ..core.grid import Step
from ..core.model import Condition
from ..core.registry import register
from ..core.state import State
from ..errors import RetourError, check_range
from ..inverters.pix2pix_zero import ZERO_PAPER
from ._energy import Internals, Reads, descent, look
from ._inject import embed, pushed
from .base import EditJob, Editor

TEXT = Reads(maps="text")


@dataclass(frozen=True)
class Pix2PixZeroOptions:
    """Options of pix2pix-zero.

    Attributes:
        rate: length :math:`\\lambda` of the gradient step on the latents; 0 leaves them alone.
        source_sentences: sentences of the edit direction's start, separated by "|"; none takes the
            source prompt.
        target_sentences: the same of its end; the target prompt then only names the result.
        negative: negative prompt of the guidance: the `source` prompt, or that of the `inversion`.
        push: part of the guidance beyond 1 that is left against the source prompt; 1: all of it.
        halves: rows whose attention is held: the conditional one (`cond`), or `both`.
    """

    rate: float = 0.1
    source_sentences: str | None = None
    target_sentences: str | None = None
    negative: Literal["source", "inversion"] = "source"
    push: float = 0.25
    halves: Literal["cond", "both"] = "cond"


@register(
    "pix2pix-zero",
    task="edit",
    summary="an edit direction in text space, with text attention held to the source's",
    paper=ZERO_PAPER,
    options=Pix2PixZeroOptions,
    nfe="5N + N gradients",
    needs={"attention", "gradients"},
    mate="pix2pix-zero",
)
class Pix2PixZero(Editor):
    """Cross-attention guidance."""

    source_branch = True

    def __init__(self, options: Pix2PixZeroOptions | None = None):
        self.options = Pix2PixZeroOptions() if options is None else options
        check_range("rate", self.options.rate, 0)
        check_range("push", self.options.push, 0, 1)
        sides = (self.options.source_sentences, self.options.target_sentences)
        if any(sides) and not all(sides):
            raise RetourError(
                "an edit direction has two ends: give both source_sentences and target_sentences, "
                f"got {sides[0]!r} and {sides[1]!r}"
            )

    def control(self, job: EditJob) -> Control:
        """Conditions, and the gradient step on the targets."""
        return _Guidance(job, self.options)


def sentences(text: str) -> list[str]:
    """Split sentences at "|"."""
    return [part.strip() for part in text.split("|") if part.strip()]


def mean_embedding(job: EditJob, text: str) -> dict[str, Tensor]:
    """Mean of the sentences' condition tensors, by name, for all images."""
    found = [embed(job, sentence).tensors for sentence in sentences(text)]
    return {name: torch.stack([f[name] for f in found]).mean(0) for name in found[0]}


class _Guidance(Control):
    """Holds the text attention of the targets to that of the source branch."""

    def __init__(self, job: EditJob, options: Pix2PixZeroOptions):
        self.options = options
        self.source = job.inversion.condition
        self.edited: Condition | None = None
        if options.source_sentences and options.target_sentences:
            start = mean_embedding(job, options.source_sentences)
            end = mean_embedding(job, options.target_sentences)
            given = self.source.tensors
            moved = {k: v + (end[k] - start[k]).to(v) for k, v in given.items()}
            self.edited = self.source.with_tensors(**moved)

    def branches(self, step: Step, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """The edited conditions; the caption as negative prompt."""
        return tuple(self._branch(branch) for branch in branches)

    def _branch(self, branch: Branch) -> Branch:
        captioned = self.options.negative == "source"
        if branch.name == "source":
            # Both halves would see the caption, so guidance would do nothing.
            return replace(branch, uncond=self.source, scale=1.0) if captioned else branch
        condition = branch.condition if self.edited is None else self.edited
        if not captioned:
            return replace(branch, condition=condition)
        scale = pushed(branch.scale, self.options.push)
        return replace(branch, condition=condition, uncond=self.source, scale=scale)

    def move(self, step: Step, denoise: Denoiser | Wrapped, state: State, layout: Layout) -> State:
        """One gradient step on the targets' latents."""
        if self.options.rate == 0 or not step.down:
            return state
        named = {branch.name: branch for branch in denoise.branches}
        targets = [named[name] for name in layout.targets()]
        halves = self._halves([named["source"]])
        source = state.x[layout["source"]].repeat(len(halves), 1, 1, 1)
        reference, _ = look(denoise, halves, source, step.t, TEXT)
        wanted = {
            name: _for_each(maps, len(halves), len(targets)) for name, maps in reference.items()
        }

        def energy(x: Tensor) -> Tensor:
            rows = x.repeat(len(halves), 1, 1, 1)
            found, _ = look(denoise, self._halves(targets), rows, step.t, TEXT)
            return mismatch(found, wanted).unflatten(0, (len(halves), len(x))).mean(0)

        x = torch.cat([state.x[layout[branch.name]] for branch in targets])
        _, slope = descent(energy, x)
        moved = dict(
            zip(layout.targets(), (x - self.options.rate * slope).chunk(len(targets)), strict=True)
        )
        return state.with_x(layout.replaced(state.x, moved))

    def _halves(self, branches: Sequence[Branch]) -> list[Condition]:
        """Conditions of the rows whose attention is held, the conditional ones first."""
        unconds = [b.uncond for b in branches if b.uncond is not None]
        return [b.condition for b in branches] + (unconds if self.options.halves == "both" else [])


def _for_each(maps: Tensor, halves: int, targets: int) -> Tensor:
    """Repeat the source's maps (halves * B, ...) for every target: (halves * targets * B, ...)."""
    return maps.unflatten(0, (halves, 1, -1)).expand(-1, targets, *[-1] * maps.ndim).flatten(0, 2)


def mismatch(found: Internals, wanted: Internals) -> Tensor:
    """Loss per row, (rows,): of each layer the mean over heads of the summed squares."""
    parts = [(found[k] - wanted[k]).square().sum((-1, -2)).mean(1).double() for k in found]
    return torch.stack(parts).sum(0)
