r"""LEDITS++: semantic guidance by edit concepts, each confined to where it matters.

The target names concepts to add, separated by commas, and, with a leading minus, concepts to take
away: "sunglasses, -hat". The source prompt stays what the picture is said to be. Per step, with
:math:`X_\varnothing, X_c` the predictions at the target's latents for the negative prompt and for
concept c, and all that follows alike for the noise face,

.. math::
   X \leftarrow X_{src} + \sum_c \pm s_c\, M_c \odot (X_c - X_\varnothing), \qquad
   M_c = M^1_c \cap M^2_c

* :math:`M^1`: where the concept's words look in this step's text attention (mean over layers and
  heads, sum over their tokens, smoothed a little), above the quantile :math:`\lambda` of places;
* :math:`M^2`: where :math:`|X_c - X_\varnothing|`, summed over channels, is above its quantile
  :math:`\lambda`.

:math:`X_{src}` is guided as the inversion was, so that without concepts the source returns:
``sde-dpm`` is the paper's mate (``edit-friendly`` leaves less noise on small latents, see
:mod:`retour.inverters.sde_dpm`). The scales :math:`s_c` are the edit's guidance unless given.

*Whole prompts*, which other editors take, are told by their words: a target that keeps at least
half of the source prompt's is one (``read`` says it outright). It is read as two concepts, the
target to add and the source to take away, in their sentences, which is where a text encoder knows
them from. The source is taken away at the scale at which it is held, and both share a mask:

.. math::
   X \leftarrow X_{src} + M \odot \big(s\,(X_{tgt} - X_\varnothing)
        - (X_{src} - X_\varnothing)\big), \qquad
   M: |X_{tgt} - X_{src}| \text{ above its quantile } \lambda

so inside M stands the target under ordinary guidance, outside of it the source. Taken away at
scale s, as two free concepts would be, it oversaturates. Words that differ look at places of an
edit badly where they are adjectives ("navy blue" of a background), so M is :math:`M^2` alone unless
``masks`` asks for both; and since whole prompts change things and grounds, not details,
:math:`\lambda` is 0.5 there, 0.9 (the paper's) for concepts. A target that says what the source
says changes nothing. All this is ours; ``read="concepts"`` is the paper's raw form always.

Where we deviate: published code asks for :math:`M^2` only once the noise has fallen below a fixed
training step; here both masks act in every step. Maps are sought by size, as in
:mod:`retour.editors.blend`; on joint attention they are the block of image queries and text keys.

Cost: (2 + concepts) N evaluations; a whole prompt counts as one concept.

Reference: Brack et al., "LEDITS++: Limitless Image Editing using Text-to-Image Models", CVPR 2024,
arXiv 2311.16711.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.control import AttentionCall, AttentionControl
from ..attention.store import AttentionStore
from ..core.branches import Branch, Denoiser, Layout, Wrapped
from ..core.control import Control
from ..core.grid import Step
from ..core.model import Condition
from ..core.path import Prediction
from ..core.registry import register
from ..errors import check_range
from ..inverters.sde_dpm import LEDITS_PAPER
from ._concepts import Concept, Read, branches_for, edits, for_each, numbers
from ._inject import embed
from .align import positions
from .base import EditJob, Editor
from .blend import mask_factor

NOTHING = "/none"
BLUR = 0.5  # Standard deviation of the 3 x 3 smoothing of attention maps, in cells.
THRESHOLD, WHOLE_THRESHOLD = 0.9, 0.5


@dataclass(frozen=True)
class LEditsOptions:
    """Options of LEDITS++.

    Attributes:
        scale: guidance of the concepts, one for all (5) or one each ("5,3"); None takes that of the
            edit, so that an edit's guidance means the same as with other editors (published: 5).
        threshold: quantile of places that a concept leaves alone, in [0, 1), one or one each; None:
            0.9 for concepts, 0.5 for a whole prompt.
        masks: which masks confine a concept; `auto`: both, for a whole prompt the prediction's.
        warmup: part of the steps, from the noisy end, before concepts act.
        cooldown: part of the steps after which they no longer act.
        read: what targets are: `concepts`, a whole `prompt`, or `auto` by the words they keep.
    """

    scale: float | str | None = None
    threshold: float | str | None = None
    masks: Literal["auto", "both", "attention", "prediction", "none"] = "auto"
    warmup: float = 0.0
    cooldown: float = 1.0
    read: Read = "auto"

    def __post_init__(self) -> None:
        for number in numbers("scale", self.scale):
            check_range("scale", number, 0)
        for number in numbers("threshold", self.threshold):
            check_range("threshold", number, 0, 1)
        check_range("warmup", self.warmup, 0, 1)
        check_range("cooldown", self.cooldown, 0, 1)


@register(
    "ledits",
    task="edit",
    summary="semantic guidance by concepts to add or remove, or a whole prompt, where they matter",
    paper=LEDITS_PAPER,
    options=LEditsOptions,
    nfe="(2 + concepts) N",
    needs={"attention"},
    mate="sde-dpm",
)
class LEdits(Editor):
    """Concepts as further branches of the target."""

    def __init__(self, options: LEditsOptions | None = None):
        self.options = LEditsOptions() if options is None else options

    def arrange(self, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """For every target one branch with the negative prompt, and one for each concept."""
        further = []
        for branch in branches:
            if branch.name == "source":
                continue
            count = branches_for(branch.condition.prompts, self.options.read)
            plain = replace(branch, uncond=None, scale=1.0, auxiliary=True)
            names = [NOTHING, *(f"/{k}" for k in range(count))]
            further += [replace(plain, name=branch.name + name) for name in names]
        return (*branches, *further)

    def control(self, job: EditJob) -> Control:
        """Semantic guidance.

        Raises:
            RetourError: empty concepts; numbers that do not fit the concepts.
        """
        return _Semantic(job, self.options)


@dataclass(frozen=True)
class _Slot:
    """The k-th concept of one target, of all images.

    Attributes:
        branch: name of its branch.
        condition: its B conditions.
        weight: (B, 1, 1, 1) sign, 0 where that image has no such concept.
        whole: (B, 1, 1, 1) 1 where it is a whole prompt, else 0.
        looked: for each image the positions of the words whose attention confines it, if any does.
        scale: guidance; None: the edit's.
        thresholds: (B,) quantiles.
    """

    branch: str
    condition: Condition
    weight: Tensor
    whole: Tensor
    looked: tuple[tuple[int, ...], ...]
    scale: float | None
    thresholds: Tensor


class _Semantic(Control):
    """The run of LEDITS++.

    Branches of a target stand where it stands: they are given its prediction.
    """

    def __init__(self, job: EditJob, options: LEditsOptions):
        self.options, self.inversion = options, job.inversion
        self.store = _StepStore()
        self.slots = {
            name: _slots(job, name, prompts, options) for name, prompts in job.targets.items()
        }
        scale = job.inversion.options.get("inversion_guidance", 1.0)
        self.base = job.inversion.guidance if scale is None else float(scale)

    def attention(self) -> Sequence[AttentionControl]:
        """The store of this step's maps."""
        slots = [slot for some in self.slots.values() for slot in some]
        return (self.store,) if any(any(slot.looked) for slot in slots) else ()

    def branches(self, step: Step, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """Targets keep the source's prompt; their further branches get the concepts."""
        named, source = {b.name: b for b in branches}, self.inversion.condition
        for target, slots in self.slots.items():
            branch, nothing = named[target], target + NOTHING
            empty = self.inversion.negative if branch.uncond is None else branch.uncond
            named[target] = replace(branch, condition=source, scale=self.base)
            # Its scale guides nothing, as it has no negative prompt: it carries the edit's.
            named[nothing] = replace(named[nothing], condition=empty, scale=branch.scale)
            for slot in slots:
                named[slot.branch] = replace(named[slot.branch], condition=slot.condition)
        return tuple(named.values())

    def denoiser(
        self, step: Step, denoise: Denoiser | Wrapped, layout: Layout
    ) -> Denoiser | Wrapped:
        """Add the concepts' guidance to the targets' predictions."""
        acts = self.options.warmup <= step.passed < self.options.cooldown

        def guide(found: Prediction, x: Tensor, t: float) -> Prediction:
            faces = {name: found.map(lambda f, n=name: f[layout[n]]) for name in layout.names}
            scales = {b.name: b.scale for b in denoise.branches}
            for target, slots in self.slots.items():
                nothing = target + NOTHING
                edited, empty = faces[target], faces[nothing]
                scale = scales[nothing]
                for slot in slots if acts else ():
                    push, gap = _push(slot, faces[slot.branch], faces[target], empty, scale)
                    mask = self._mask(slot, gap)
                    edited = Prediction(edited.x0 + mask * push.x0, edited.eps + mask * push.eps)
                for name in (target, nothing, *(slot.branch for slot in slots)):
                    faces[name] = edited
            return Prediction(
                torch.cat([faces[name].x0 for name in layout.names]),
                torch.cat([faces[name].eps for name in layout.names]),
            )

        return Wrapped(denoise, guide)

    def _mask(self, slot: _Slot, gap: Prediction) -> Tensor:
        """Where the concept acts, (B, 1, h, w)."""
        size = (gap.x0.shape[-2], gap.x0.shape[-1])
        mask = torch.ones_like(gap.x0[:, :1])
        if self.options.masks in ("auto", "both", "prediction"):
            # The velocity's gap is that of either face, times a number, at every level.
            mask = mask * _above(gap.velocity.abs().sum(1), slot.thresholds)[:, None].to(mask)
        factor = mask_factor(size)
        for image, tokens in enumerate(slot.looked):
            if tokens:
                heat = _smooth(self.store.word(slot.branch, image, tokens, factor))
                seen = _above(heat[None], slot.thresholds[image : image + 1])[None].to(mask)
                mask[image] *= F.interpolate(seen, size)[0]
        return mask


def _push(
    slot: _Slot, concept: Prediction, source: Prediction, empty: Prediction, scale: float
) -> tuple[Prediction, Prediction]:
    """What a concept adds where it acts, and the difference that says where."""
    scale = scale if slot.scale is None else slot.scale
    whole, weight = slot.whole.to(concept.x0), scale * slot.weight.to(concept.x0)

    def push(c: Tensor, s: Tensor, e: Tensor) -> Tensor:
        return weight * (c - e) - whole * (s - e)

    def gap(c: Tensor, s: Tensor, e: Tensor) -> Tensor:
        return c - whole * s - (1 - whole) * e

    faces = [(concept.x0, source.x0, empty.x0), (concept.eps, source.eps, empty.eps)]
    return Prediction(*(push(*f) for f in faces)), Prediction(*(gap(*f) for f in faces))


class _StepStore(AttentionStore):
    """Maps of the step in progress only."""

    def __init__(self) -> None:
        super().__init__()
        self._step: Step | None = None

    def probs(self, call: AttentionCall, probs: Tensor) -> Tensor:
        """Forget the step before; then as every store."""
        if call.step != self._step:
            self._step = call.step
            self._sums.clear()
            self._counts.clear()
        return super().probs(call, probs)


def _slots(
    job: EditJob, target: str, prompts: Sequence[str], options: LEditsOptions
) -> tuple[_Slot, ...]:
    pairs = zip(job.sources, prompts, strict=True)
    said = [edits(source, prompt, options.read) for source, prompt in pairs]
    count = branches_for(prompts, options.read)
    most = max(map(len, said))
    scales = for_each("scale", options.scale, most)
    thresholds = for_each("threshold", options.threshold, most)
    empty = job.inversion.negative
    slots = []
    for k in range(count):
        here = [some[k] if k < len(some) else None for some in said]
        rows = [
            empty.take([i]) if c is None else embed(job, c.text).take([i])
            for i, c in enumerate(here)
        ]
        own = [WHOLE_THRESHOLD if c is not None and c.whole else THRESHOLD for c in here]
        slots.append(
            _Slot(
                f"{target}/{k}",
                Condition.cat(rows),
                _column([0.0 if c is None else c.sign for c in here]),
                _column([float(c is not None and c.whole) for c in here]),
                tuple(_looked(job, c, options.masks) for c in here),
                scales[k] if k < len(scales) else None,
                torch.tensor(own if k >= len(thresholds) else [thresholds[k]] * len(here)),
            )
        )
    return tuple(slots)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None, None, None]


def _looked(job: EditJob, concept: Concept | None, masks: str) -> tuple[int, ...]:
    """Positions of the words whose attention confines a concept."""
    wanted = masks in ("both", "attention") or (masks == "auto" and concept and not concept.whole)
    if concept is None or not wanted:
        return ()
    tokens = job.model.tokens(concept.text)
    return positions(tokens, concept.words) or tuple(t for w in tokens.words for t in w.tokens)


def _above(heat: Tensor, quantiles: Tensor) -> Tensor:
    """Where (B, h, w) is at or above the (B,) quantiles of its images."""
    rows = zip(heat.flatten(1), quantiles.to(heat), strict=True)
    least = torch.stack([row.quantile(level) for row, level in rows])
    return heat >= least[:, None, None]


def _smooth(heat: Tensor) -> Tensor:
    """(h, w) blurred by a narrow 3 x 3 Gaussian, its edges mirrored."""
    line = torch.tensor([1.0, 0.0, 1.0]).mul(-1 / (2 * BLUR**2)).exp().to(heat)
    kernel = torch.outer(line, line) / line.sum() ** 2
    padded = F.pad(heat[None, None], (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernel[None, None])[0, 0]
