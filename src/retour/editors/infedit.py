r"""InfEdit: an edit without inversion, by a source, a target and a layout between them.

On top of a virtual inversion (:mod:`retour.inverters.virtual`) each target is accompanied by a
layout branch with the source's prompt, and Unified Attention Control ties the three together
(:mod:`retour.editors._unified`). With words given, a blend after each step but the first decides
where each of them shows:

.. math::
   x_{tgt} \leftarrow \begin{cases} x_{src} & \text{where the source's } keep \text{ words look}\\
   x_{tgt} & \text{where the } edit \text{ words look} \\ x_{lay} & \text{elsewhere}\end{cases}

A place counts as looked at where the words' map (mean over layers, heads and steps so far, largest
over their tokens, divided by its maximum) exceeds a threshold; that of `edit` words is at least
:math:`0.15/\alpha_t`, so that the layout decides while there is much noise. Edit words are looked
up in the target's prompt, those that have a counterpart in the layout's maps; keep words in the
source's. Without edit words the target itself stands elsewhere.

The layout elsewhere is the published code's, which serves changes of pose as well; the paper writes
the source there, :math:`(1 - m_{tgt} + m_{src})\,x_{src} + (m_{tgt} - m_{src})\,x_{tgt}`:
``elsewhere="source"``. The published benchmark blends, with the word that the edit concerns
(``edit_words="auto"`` finds it); here there is no blend unless words are given. Guidance and steps
are the edit's and the model's: published are 2.3 (the source at 1) and 12 on a consistency model.

Where we deviate: the published code blends after the last step too, but has already taken its
picture before that; here the picture is the blended one (``blend_last=False`` is as published). It
mixes up the prompts in the similarity stage of the alignment; here the right embeddings are
compared. Maps are sought by size, as in :mod:`retour.editors.blend`.

Any inversion will do whose way back corrects all branches alike, so that a branch with the source's
prompt is the source: noise maps do as well as the virtual chain.

Cost: 4N evaluations for one target guided alone: source, layout, target twice.

Reference: Xu et al., "Inversion-Free Image Editing with Language-Guided Diffusion Models", CVPR
2024, arXiv 2312.04965.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..attention.control import AttentionControl
from ..attention.store import AttentionStore
from ..core.branches import Branch, Layout, rescale
from ..core.control import Control
from ..core.grid import Step
from ..core.model import Tokens
from ..core.registry import register
from ..core.state import State
from ..errors import RetourError, check_range
from ..inverters.virtual import INFEDIT_PAPER
from ._schedules import OFF
from ._unified import CrossControl, SelfControl, similar
from .align import Alignment, differing, positions
from .base import EditJob, Editor
from .blend import mask_factor, normalised

HEAT = 0.15
SUFFIX = "-layout"


@dataclass(frozen=True)
class InfEditOptions:
    """Options of InfEdit.

    Attributes:
        cross_steps: part of the steps, from the noisy end, in which aligned words keep the layout's
            maps.
        self_steps: part of the steps in which all branches look as the source does (1 for colours,
            0.9 for materials, 0.7 for objects and styles, 0.3 for poses, 0 to add or remove).
        maps: whose maps aligned words keep.
        edit_words: words of the target prompt, outside of whose place the target does not show;
            `auto` for those that only the target has; `off`.
        elsewhere: what shows outside of that place: the `layout`, or the `source` as in the paper.
        keep_words: words of the source prompt, in whose place the source shows; `off`.
        edit_threshold: of the edit words' map.
        keep_threshold: of the keep words' map.
        blend_last: blend after the last step too.
    """

    cross_steps: float = 0.7
    self_steps: float = 0.7
    maps: Literal["layout", "source"] = "layout"
    edit_words: str | None = None
    elsewhere: Literal["layout", "source"] = "layout"
    keep_words: str | None = None
    edit_threshold: float = 0.55
    keep_threshold: float = 0.6
    blend_last: bool = True

    def __post_init__(self) -> None:
        for name in ("cross_steps", "self_steps", "edit_threshold", "keep_threshold"):
            check_range(name, getattr(self, name), 0, 1)


@register(
    "infedit",
    task="edit",
    summary="a layout branch between source and target, tied by attention; no inversion needed",
    paper=INFEDIT_PAPER,
    options=InfEditOptions,
    nfe="4N",
    needs={"attention"},
    requires={"anchored"},
    mate="virtual",
)
class InfEdit(Editor):
    """Unified attention control and blend."""

    source_branch = True

    def __init__(self, options: InfEditOptions | None = None):
        self.options = InfEditOptions() if options is None else options

    def arrange(self, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """A layout branch for every target."""
        source = next(b for b in branches if b.name == "source")
        layouts = [
            replace(source, name=b.name + SUFFIX, auxiliary=True)
            for b in branches
            if b.name != "source"
        ]
        return (*branches, *layouts)

    def control(self, job: EditJob) -> Control:
        """Attention control and, if words are given, the blend.

        Raises:
            RetourError: words that are in no prompt.
        """
        return _Unified(job, self.options)


@dataclass(frozen=True)
class _Pair:
    """One target row: both prompts' tokens and their alignment."""

    source: Tokens
    target: Tokens
    alignment: Alignment


class _Unified(Control):
    """The run of InfEdit."""

    def __init__(self, job: EditJob, options: InfEditOptions):
        self.options = options
        self.path = job.model.path
        self.pairs = {
            (branch, image): _pair(job, image, prompt)
            for branch, prompts in job.targets.items()
            for image, prompt in enumerate(prompts)
        }
        self.layouts = {name: name + SUFFIX for name in job.targets}
        self.edited = {k: _tokens(p.target, options.edit_words, p) for k, p in self.pairs.items()}
        self.kept = {k: _tokens(p.source, options.keep_words, None) for k, p in self.pairs.items()}
        _require("edit_words", options.edit_words, self.edited.values(), job)
        _require("keep_words", options.keep_words, self.kept.values(), job)
        self.store = AttentionStore()

    @property
    def blends(self) -> bool:
        """Whether any word decides on places."""
        return any(self.edited.values()) or any(self.kept.values())

    def attention(self) -> Sequence[AttentionControl]:
        """The store sees the maps before they are changed."""
        alignments = {key: pair.alignment for key, pair in self.pairs.items()}
        names = (
            self.layouts if self.options.maps == "layout" else dict.fromkeys(self.layouts, "source")
        )
        controls: list[AttentionControl] = [self.store] if self.blends else []
        if self.options.cross_steps > 0:
            controls.append(CrossControl(alignments, names, self.options.cross_steps))
        return [*controls, SelfControl(self.layouts, self.options.self_steps)]

    def branches(self, step: Step, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """Layouts are guided as the source is."""
        scale = next(b.scale for b in branches if b.name == "source")
        return rescale(branches, **dict.fromkeys(self.layouts.values(), scale))

    def after_step(self, step: Step, state: State, before: State, layout: Layout) -> State:
        """Blend, from the second step on."""
        last = step.index == 0 and not self.options.blend_last
        if not self.blends or step.position == 0 or last:
            return state
        size = (state.x.shape[-2], state.x.shape[-1])
        outside = self.layouts if self.options.elsewhere == "layout" else {}
        rows = [
            (
                *(
                    layout[name].start + image
                    for name in (branch, outside.get(branch, "source"), "source")
                ),
                *self._masks(branch, image, pair, size, step),
            )
            for (branch, image), pair in self.pairs.items()
        ]

        def blend(value: Tensor) -> Tensor:
            if value.shape != state.x.shape:
                return value
            value = value.clone()
            for target, between, source, edited, kept in rows:
                value[target] = torch.where(edited.to(value.device), value[target], value[between])
                value[target] = torch.where(kept.to(value.device), value[source], value[target])
            return value

        return state.map(blend)

    def _masks(
        self, branch: str, image: int, pair: _Pair, size: tuple[int, int], step: Step
    ) -> tuple[Tensor, Tensor]:
        """Where the target stands, and where the source does, (h, w) boolean."""
        everywhere = torch.ones(size, dtype=torch.bool)
        edited, kept = everywhere, ~everywhere
        if self.edited[branch, image]:
            edited = self._edit_mask(branch, image, pair, size, step)
        if self.kept[branch, image]:
            places = [("source", image, token) for token in self.kept[branch, image]]
            kept = self._heat(places, size) > self.options.keep_threshold
        return edited, kept

    def _edit_mask(
        self, branch: str, image: int, pair: _Pair, size: tuple[int, int], step: Step
    ) -> Tensor:
        matrix, kept = pair.alignment.matrix, pair.alignment.kept
        places = [
            (self.layouts[branch], image, int(matrix[:, token].argmax()))
            if kept[token]
            else (branch, image, token)
            for token in self.edited[branch, image]
        ]
        alpha = float(self.path.alpha(step.noisy))
        least = HEAT / alpha if alpha > 0 else float("inf")
        return self._heat(places, size) > max(self.options.edit_threshold, least)

    def _heat(self, places: Sequence[tuple[str, int, int]], size: tuple[int, int]) -> Tensor:
        """Largest of some tokens' maps at latent size, its maximum 1."""
        factor = mask_factor(size)
        maps = [self.store.word(b, image, (token,), factor) for b, image, token in places]
        return normalised(torch.stack(maps).amax(0), size, pool=False)


def _pair(job: EditJob, image: int, prompt: str) -> _Pair:
    source, target = (job.model.tokens(text) for text in (job.sources[image], prompt))
    old = job.inversion.condition.tensors["embeds"][image]
    new = job.model.embed([prompt]).tensors["embeds"][0].to(old.device)
    return _Pair(source, target, similar(source, target, old, new))


def _tokens(prompt: Tokens, words: str | None, pair: _Pair | None) -> tuple[int, ...]:
    if words in OFF or words is None:
        return ()
    if words == "auto" and pair is not None:
        return differing(pair.source, pair.target)[1]
    return positions(prompt, words)


def _require(
    option: str, words: str | None, found: Collection[tuple[int, ...]], job: EditJob
) -> None:
    if words in (*OFF, "auto") or any(found):
        return
    said = " | ".join(
        job.sources
        if option == "keep_words"
        else [p for prompts in job.targets.values() for p in prompts]
    )
    raise RetourError(f"{option} names {words!r}, which is not in {said!r}")
