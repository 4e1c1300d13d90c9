r"""Prompt-to-Prompt: the target keeps the source's attention maps, so it keeps the source's layout.

One batch carries a source branch and the target branches. In every hooked layer, for conditional
rows, with :math:`M` the attention probabilities, :math:`R, \beta` the alignment of the two prompts
(:mod:`retour.editors.align`), :math:`c` a scale per target token and :math:`\alpha_s\in\{0,1\}` the
schedule at step s (counted from the noisy end):

.. math::
    G_j &= c_j\,\big(\beta_j (M_{src} R)_j + (1-\beta_j) M_{tgt,j}\big)\\
    M_{tgt,j} &\leftarrow \alpha_{s,j}\, G_j + (1-\alpha_{s,j})\, M_{tgt,j}

for text attention, and :math:`M_{tgt}\leftarrow M_{src}` for self-attention of coarse layers while
:math:`\lfloor T s_0\rfloor\le s<\lfloor T s_1\rfloor`. The text schedule has T+1 rows: on for
:math:`\lfloor s_0(T+1)\rfloor\le s<\lfloor s_1(T+1)\rfloor`, with a range of its own for chosen
words. The source row is never touched. *Replace*, *refine* and *reweight* are one formula here,
with another R or c. :class:`~retour.editors.blend.LocalBlend` may confine the edit.

Nothing is renormalised, as in the paper: a scaled or partly inherited row need not sum to one.

Transformers with joint attention (SD3, FLUX): text control acts on the block of image queries and
text keys, self control on the block of image queries and image keys; text queries stay as they are.
Blocks are exchanged as they are, so a row that mixes blocks of both prompts sums to about one only.
Text tokens beyond the tokenised ones (the zeros of a missing T5) keep the target's own maps.

Resolutions: the published rule "at most 32 x 32 of 64 x 64" becomes `self_max`, a fraction of the
latents' edge: 1/2 is 8 x 8 on 16 x 16 latents. A transformer has one resolution: always controlled.

Cost: 4N evaluations for one target with guidance (source and target, two halves each).

Defaults are those of Ju et al. (P2P in the benchmark of Direct Inversion): text attention 0.4 of
the steps, self-attention 0.6. Three settings of that benchmark are not: their benchmark always
aligns (``mode="refine"``), where `auto` pairs word by word if it can, as the paper does; it blends
with the edit's word and doubles that word's attention (``blend="cat,dog"``, ``reweight="dog:2"``),
where here nobody has named one.

Reference: Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", 2022,
arXiv 2208.01626. Default schedule: Ju et al., arXiv 2310.01506 (its P2P protocol).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..attention.control import AttentionCall, AttentionControl
from ..core.branches import Rows
from ..core.control import Attending, Chain, Control
from ..core.model import Tokens
from ..core.registry import Paper, register
from ..errors import RetourError, check_range
from ._schedules import OFF, Steps, cross_schedule, parse_range, parse_scales, schedule_table, sides
from .align import align, differing, positions
from .base import EditJob, Editor
from .blend import BlendTokens, LocalBlend


@dataclass(frozen=True)
class P2POptions:
    """Options of Prompt-to-Prompt.

    Attributes:
        mode: pair words by place (`replace`), align equal tokens (`refine`), or `auto`: replace if
            both prompts have equally many words, else refine.
        cross_steps: fraction of the steps, from the noisy end, with the source's text attention: an
            end (0.4), a range ("0.1-0.4"), with ranges for target words ("0.4,lemon:0.2").
        self_steps: the same for self-attention: an end or a range.
        reweight: scales of target words: "fluffy:2,red:0.5"; `none` for none.
        blend: confine the edit to where words look: "source words,target words"; "words" for both;
            `auto` for the words that differ; `off`.
        blend_subtract: words, in the same form, whose place is taken out of that.
        blend_threshold: of the normalised map.
        blend_start: fraction of the steps before blending begins.
        self_max: finest self-attention controlled, as a fraction of the latents' edge.
    """

    mode: Literal["auto", "replace", "refine"] = "auto"
    cross_steps: Steps = 0.4
    self_steps: Steps = 0.6
    reweight: str | Mapping[str, float] | None = None
    blend: str | None = None
    blend_subtract: str | None = None
    blend_threshold: float = 0.3
    blend_start: float = 0.2
    self_max: float = 0.5


@dataclass(frozen=True)
class TokenEdit:
    """The text side of one edit: L target tokens, T steps.

    Attributes:
        matrix: R, (L, L).
        kept: beta, (L,).
        scale: c, (L,).
        alpha: schedule, (T+1, L).
    """

    matrix: Tensor
    kept: Tensor
    scale: Tensor
    alpha: Tensor


class P2PAttention(AttentionControl):
    """Prompt-to-Prompt's attention control, for any number of target rows.

    Args:
        edits: (target branch, image) -> its edit; all over the same number of steps.
        self_window: first and past-the-end step of self-attention control.
        self_max: finest self-attention controlled, as a fraction of the latents' edge.
    """

    def __init__(
        self,
        edits: Mapping[tuple[str, int], TokenEdit],
        self_window: tuple[int, int],
        self_max: float = 0.5,
    ):
        self.keys = tuple(edits)
        self.self_window, self.self_max = self_window, self_max
        self.matrix, self.kept, self.scale, self.alpha = (
            torch.stack([getattr(e, name) for e in edits.values()], dim=dim)
            for name, dim in (("matrix", 0), ("kept", 0), ("scale", 0), ("alpha", 1))
        )
        self.text_steps: list[bool] = self.alpha.flatten(1).any(1).tolist()
        # The same in every layer of a step: found once.
        self.places: dict[Rows, tuple[list[int], Tensor, Tensor]] = {}
        self.tables: dict[Any, tuple[Tensor, Tensor]] = {}

    def active(self, call: AttentionCall) -> bool:
        """In steps and at resolutions that the schedules name."""
        return self._edits_text(call) or self._edits_self(call)

    def needs_maps(self, call: AttentionCall) -> bool:
        """Not in pure self-attention, where the maps of the source are its queries and keys."""
        return call.site.kind != "self"

    def qkv(
        self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Give targets the source's queries and keys in self-attention: the same maps, cheaply."""
        which, target, source = self._rows(call)
        if self.needs_maps(call) or not which:
            return q, k, v
        target, source = target.to(q.device), source.to(q.device)
        return q.index_copy(0, target, q[source]), k.index_copy(0, target, k[source]), v

    def probs(self, call: AttentionCall, probs: Tensor) -> Tensor:
        """Rewrite the rows of targets from those of the source."""
        which, target, source = self._rows(call)
        if not which:
            return probs
        target, source = target.to(probs.device), source.to(probs.device)
        if self._edits_text(call):
            probs = self._inherit_text(call, probs, which, target, source)
        if self._edits_self(call):
            maps = call.image_to_image(probs)
            maps = maps.index_copy(0, target, maps[source])
            probs = call.with_block(probs, maps, call.image)
        return probs

    def _edits_text(self, call: AttentionCall) -> bool:
        if call.text is None or call.step is None or not call.step.down:
            return False
        return self.text_steps[call.step.position]

    def _edits_self(self, call: AttentionCall) -> bool:
        if call.site.kind == "cross" or call.step is None or not call.step.down:
            return False
        first, stop = self.self_window
        return first <= call.step.position < stop and call.within(self.self_max)

    def _rows(self, call: AttentionCall) -> tuple[list[int], Tensor, Tensor]:
        """Edits present in this call, with the indices of their target and source rows."""
        known = self.places.get(call.rows)
        if known is None:
            known = self.places[call.rows] = self._find_rows(call.rows)
        return known

    def _find_rows(self, rows: Rows) -> tuple[list[int], Tensor, Tensor]:
        place = rows.conditional()
        found = [
            (n, place[key], place["source", key[1]])
            for n, key in enumerate(self.keys)
            if key in place and ("source", key[1]) in place
        ]
        target, source = (torch.tensor([f[k] for f in found], dtype=torch.long) for k in (1, 2))
        return [n for n, _, _ in found], target, source

    def _inherit_text(
        self, call: AttentionCall, probs: Tensor, which: list[int], target: Tensor, source: Tensor
    ) -> Tensor:
        assert call.step is not None and call.text is not None
        maps = call.image_to_text(probs)
        key = (call.step.position, tuple(which), maps.shape[-1], maps.dtype, maps.device)
        if key not in self.tables:
            taken, own = self._mixture(call.step.position, which, maps.shape[-1])
            self.tables[key] = taken.to(maps), own.to(maps)
        taken, own = self.tables[key]
        mixed = maps.index_select(0, source) @ taken + maps.index_select(0, target) * own
        return call.with_block(probs, maps.index_copy(0, target, mixed), call.text)

    def _mixture(self, position: int, which: list[int], size: int) -> tuple[Tensor, Tensor]:
        """Factors of the source's maps, (n, 1, L, L'), and of one's own, (n, 1, 1, L')."""
        tables = (self.matrix, self.kept, self.scale, self.alpha[position])
        matrix, kept, scale, alpha = (_fit(t[which], size) for t in tables)
        taken, own = alpha * scale * kept, alpha * scale * (1 - kept) + 1 - alpha
        return (matrix * taken[:, None])[:, None], own[:, None, None]


def _fit(table: Tensor, size: int) -> Tensor:
    """Cut or zero-pad every token axis to `size`: tokens that no table knows are left alone."""
    pad = [n for length in reversed(table.shape[1:]) for n in (0, size - length)]
    return torch.nn.functional.pad(table, pad)


@register(
    "p2p",
    task="edit",
    summary="the target inherits the source's attention maps: same layout, new content",
    paper=Paper(
        title="Prompt-to-Prompt Image Editing with Cross Attention Control",
        authors="Hertz, Amir and Mokady, Ron and Tenenbaum, Jay and Aberman, Kfir and "
        "Pritch, Yael and Cohen-Or, Daniel",
        year=2022,
        arxiv="2208.01626",
        venue="ICLR 2023",
    ),
    options=P2POptions,
    nfe="4N",
    needs={"attention"},
)
class PromptToPrompt(Editor):
    """Prompt-to-Prompt: replace, refine, reweight, local blend."""

    source_branch = True

    def __init__(self, options: P2POptions | None = None):
        self.options = P2POptions() if options is None else options
        # Malformed options are refused before any work.
        cross_schedule(self.options.cross_steps)
        parse_range(self.options.self_steps, "self_steps")
        parse_scales(self.options.reweight)
        for name in ("blend_threshold", "blend_start", "self_max"):
            check_range(name, getattr(self.options, name), 0, 1)

    def control(self, job: EditJob) -> Control:
        """Attention control for all targets, and local blend if asked for.

        Raises:
            RetourError: prompts that do not fit the mode; words that are in no prompt.
        """
        pairs = {
            (branch, image): (job.model.tokens(source), job.model.tokens(target))
            for branch, targets in job.targets.items()
            for image, (source, target) in enumerate(zip(job.sources, targets, strict=True))
        }
        steps, options = job.grid.steps, self.options
        self._check_words(pairs.values())
        edits = {key: self.edit(*pair, steps) for key, pair in pairs.items()}
        low, high = parse_range(options.self_steps, "self_steps")
        window = (int(steps * low), int(steps * high))
        attend = Attending(P2PAttention(edits, window, options.self_max))
        tokens = {key: self._blend_tokens(*pair) for key, pair in pairs.items()}
        if not any(t.source or t.target for t in tokens.values()):
            return attend
        # The blend's store comes first: it sees the maps before they are edited.
        blend = LocalBlend(tokens, threshold=options.blend_threshold, start=options.blend_start)
        return Chain([blend, attend])

    def edit(self, source: Tokens, target: Tokens, steps: int) -> TokenEdit:
        """Make the tables of one pair of prompts for a run of `steps` steps."""
        found = align(source, target, self.options.mode)
        scale = torch.ones(len(target.ids))
        for word, value in parse_scales(self.options.reweight).items():
            scale[list(positions(target, word))] = value
        alpha = schedule_table(self.options.cross_steps, target, steps)
        return TokenEdit(found.matrix, found.kept, scale, alpha)

    def _blend_tokens(self, source: Tokens, target: Tokens) -> BlendTokens:
        words, subtract = self.options.blend, self.options.blend_subtract
        if words is None or words in OFF:
            return BlendTokens()
        if words == "auto":
            include = differing(source, target)
        else:
            old, new = sides(words)
            include = positions(source, old), positions(target, new)
        old, new = sides("" if subtract is None or subtract in OFF else subtract)
        return BlendTokens(*include, positions(source, old), positions(target, new))

    def _check_words(self, pairs: Iterable[tuple[Tokens, Tokens]]) -> None:
        """Refuse a word that no prompt holds: it would silently do nothing."""
        pairs, options = list(pairs), self.options
        targets = [target for _, target in pairs]
        for word in parse_scales(options.reweight):
            _require("reweight", word, targets)
        for word in cross_schedule(options.cross_steps)[1]:
            _require("cross_steps", word, targets)
        for name in ("blend", "blend_subtract"):
            value = getattr(options, name)
            if value in (*OFF, "auto"):
                continue
            old, new = sides(value)
            if old == new:
                _require(name, old, [prompt for pair in pairs for prompt in pair])
            else:
                _require(name, old, [source for source, _ in pairs])
                _require(name, new, targets)


def _said(words: str, prompts: Sequence[Tokens]) -> bool:
    return all(any(positions(p, word) for p in prompts) for word in words.split())


def _require(option: str, words: str, prompts: Sequence[Tokens]) -> None:
    for word in words.split():
        if not _said(word, prompts):
            said = " | ".join(" ".join(w.text for w in p.words) for p in prompts)
            raise RetourError(f"{option} names the word {word!r}, which is not in {said!r}")
