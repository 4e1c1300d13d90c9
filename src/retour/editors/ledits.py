r"""LEDITS++: semantic guidance by edit concepts, each confined to where it matters.

The target prompt names concepts to add, separated by commas, and, with a leading minus, concepts to
take away: "green, -red". The source prompt stays what the picture is said to be. Per step, with
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
``sde-dpm`` is the usual mate. The scales :math:`s_c` are the edit's guidance unless given.

Where we deviate: published code asks for :math:`M^2` only once the noise has fallen below a fixed
training step; here both masks act in every step. Maps are sought by size, as in
:mod:`retour.editors.blend`; on joint attention they are the block of image queries and text keys.

Cost: (2 + concepts) N evaluations.

Reference: Brack et al., "LEDITS++: Limitless Image Editing using Text-to-Image Models", CVPR 2024,
arXiv 2311.16711.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.hooks import AttentionCall, AttentionControl
from ..attention.store import AttentionStore
from ..core.branches import Branch, Denoiser, Layout, Wrapped
from ..core.control import Control
from ..core.grid import Step
from ..core.model import Condition
from ..core.path import Prediction
from ..core.registry import register
from ..errors import RetourError, check_range
from ..inverters.sde_dpm import LEDITS_PAPER
from ._inject import embed
from .base import EditJob, Editor
from .blend import LEAST_GRID

NOTHING = "/none"
BLUR = 0.5  # Standard deviation of the 3 x 3 smoothing of attention maps, in cells.


@dataclass(frozen=True)
class LEditsOptions:
    """Options of LEDITS++.

    Attributes:
        scale: guidance of the concepts, one for all (5) or one each ("5,3"); None takes that of the
            edit.
        threshold: quantile of places that a concept leaves alone, in [0, 1), one or one each.
        masks: which masks confine a concept.
        warmup: part of the steps, from the noisy end, before concepts act.
        cooldown: part of the steps after which they no longer act.
    """

    scale: float | str | None = None
    threshold: float | str = 0.9
    masks: Literal["both", "attention", "prediction", "none"] = "both"
    warmup: float = 0.0
    cooldown: float = 1.0

    def __post_init__(self) -> None:
        for number in numbers("scale", self.scale):
            check_range("scale", number, 0)
        for number in numbers("threshold", self.threshold) or [math.nan]:
            check_range("threshold", number, 0, 1)
        check_range("warmup", self.warmup, 0, 1)
        check_range("cooldown", self.cooldown, 0, 1)


@dataclass(frozen=True)
class Concept:
    """What to add to the picture, or (`sign` -1) to take away."""

    text: str
    sign: float


def concepts(prompt: str) -> tuple[Concept, ...]:
    """Read "green, -red".

    Raises:
        RetourError: a part between commas is empty.
    """
    parts = [part.strip() for part in prompt.split(",")]
    found = tuple(Concept(p.lstrip("- "), -1.0 if p.startswith("-") else 1.0) for p in parts)
    if not all(c.text for c in found):
        raise RetourError(
            f"the target {prompt!r} has an empty concept: separate concepts by commas, with a "
            "minus before those to remove (green, -red)"
        )
    return found


def numbers(name: str, value: float | str | None) -> list[float]:
    """Read one number, several separated by commas, or none."""
    if value is None or str(value).lower() in ("", "none"):
        return []
    try:
        return [float(part) for part in str(value).split(",")]
    except ValueError:
        raise RetourError(
            f"{name} is {value!r}: give a number, or one for each concept (5,3)"
        ) from None


@register(
    "ledits",
    task="edit",
    summary="semantic guidance by concepts to add or remove, masked to where they matter",
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
            count = max(len(concepts(prompt)) for prompt in branch.condition.prompts)
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
        tokens: for each image the positions of the concept's words.
        scale: guidance; None: the edit's.
        threshold: quantile.
    """

    branch: str
    condition: Condition
    weight: Tensor
    tokens: tuple[tuple[int, ...], ...]
    scale: float | None
    threshold: float


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
        return (self.store,) if self.options.masks in ("both", "attention") else ()

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
        passed = step.position / step.count
        acts = self.options.warmup <= passed < self.options.cooldown

        def guide(found: Prediction, x: Tensor, t: float) -> Prediction:
            faces = {name: found.map(lambda f, n=name: f[layout[n]]) for name in layout.names}
            scales = {b.name: b.scale for b in denoise.branches}
            for target, slots in self.slots.items():
                nothing = target + NOTHING
                edited, empty = faces[target], faces[nothing]
                for slot in slots if acts else ():
                    gap = Prediction(
                        faces[slot.branch].x0 - empty.x0, faces[slot.branch].eps - empty.eps
                    )
                    weight = slot.weight.to(x) * self._mask(slot, gap)
                    weight = weight * (scales[nothing] if slot.scale is None else slot.scale)
                    edited = Prediction(edited.x0 + weight * gap.x0, edited.eps + weight * gap.eps)
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
        if self.options.masks in ("both", "prediction"):
            # The velocity's gap is that of either face, times a number, at every level.
            mask = mask * _above(gap.velocity.abs().sum(1), slot.threshold)[:, None].to(mask)
        if self.options.masks in ("both", "attention"):
            factor = min(4.0, min(size) / LEAST_GRID)
            for image, tokens in enumerate(slot.tokens):
                if tokens:
                    heat = _smooth(self.store.word(slot.branch, image, tokens, factor))
                    seen = _above(heat[None], slot.threshold)[None].to(mask)
                    mask[image] *= F.interpolate(seen, size)[0]
        return mask


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
    said = [concepts(prompt) for prompt in prompts]
    count = max(map(len, said))
    scales: Sequence[float | None] = _for_each("scale", options.scale, count) or [None] * count
    thresholds = _for_each("threshold", options.threshold, count)
    empty = job.inversion.negative
    slots = []
    for k in range(count):
        here = [some[k] if k < len(some) else None for some in said]
        rows = [
            empty.take([i]) if c is None else embed(job, c.text).take([i])
            for i, c in enumerate(here)
        ]
        signs = [0.0 if c is None else c.sign for c in here]
        tokens = [
            () if c is None else tuple(t for w in job.model.tokens(c.text).words for t in w.tokens)
            for c in here
        ]
        slots.append(
            _Slot(
                f"{target}/{k}",
                Condition.cat(rows),
                torch.tensor(signs, dtype=torch.float64)[:, None, None, None],
                tuple(tokens),
                scales[k],
                thresholds[k],
            )
        )
    return tuple(slots)


def _for_each(name: str, value: float | str | None, count: int) -> list[float]:
    """One number for each of `count` concepts; one alone is for all."""
    given = numbers(name, value)
    if len(given) == 1:
        return given * count
    if 0 < len(given) < count:
        raise RetourError(
            f"{len(given)} values of {name} for {count} concepts: give one, or one for each concept"
        )
    return given


def _above(heat: Tensor, quantile: float) -> Tensor:
    """Where (B, h, w) is at or above its image's quantile."""
    least = torch.quantile(heat.flatten(1), quantile, dim=1)
    return heat >= least[:, None, None]


def _smooth(heat: Tensor) -> Tensor:
    """(h, w) blurred by a narrow 3 x 3 Gaussian, its edges mirrored."""
    line = torch.tensor([1.0, 0.0, 1.0]).mul(-1 / (2 * BLUR**2)).exp().to(heat)
    kernel = torch.outer(line, line) / line.sum() ** 2
    padded = F.pad(heat[None, None], (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernel[None, None])[0, 0]
