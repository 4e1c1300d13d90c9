r"""Did the edit happen? A yes or no for each kind of edit of the paired set.

What can be measured in the pixels is measured; only what needs eyes is put to a network:

| kind | yes if | judge |
| --- | --- | --- |
| background | the region's median colour is nearest to the named one | measured |
| colour | most of the region's vivid pixels have the hue of the named one | measured |
| delete object | 90 % of the region have the colour of the picture's border | measured |
| position | what differs from the border's colour has its centre in the named corner | measured |
| object | the classifier's first choice is the new object | emoji-cnn (31 objects) |
| other objects | the new caption is among the best 5 with any of 214 objects in it | emoji-clip |
| add object | as object, on the region alone, cut out and set on the border's colour | either |
| style | the new caption scores best among those of the three styles | emoji-clip |

The thresholds were set so that true edits pass and unchanged inputs do not. Of the 168 pairs that
ship with retour 164 true edits pass (style fails 3, object and add 1 at most), and 5 unchanged
inputs (style 3, object 2); where colours are measured no verdict is wrong.

What this cannot judge: how well things are drawn, whether a moved or recoloured object is still
the same one, and whether the rest was kept (the background metrics tell). The networks know emoji
scenes of 64 pixels alone. Other kinds, and prompts that are not built like the paired set's
captions, have no verdict (None).
"""

from __future__ import annotations

import colorsys
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.palette import BACKGROUNDS, OBJECT_COLOURS, nearest_background, saturation
from ...data.scenes import CORNERS, RELATIONS, STYLE_PHRASES, with_article
from .alignment import ClipScorer, region
from .pixelwise import Mask, as_mask
from .structure import CLIP

# Euclidean distance of colours in [0, 1]^3 below which two are taken for the same.
SAME = 0.2
CLEARED = 0.9
VIVID, DARK = 0.3, 0.2
LEAST = 0.01
FRAME = 2
BEST = 5
MARGIN = 1 / 8

MEASURED, CNN, TINY_CLIP = "measured", "emoji-cnn", "emoji-clip"
JUDGES = f"{MEASURED} colours, {CNN}, {TINY_CLIP}"


@dataclass(frozen=True)
class Verdict:
    """Whether an edit happened, and who says so."""

    success: bool
    judge: str


@dataclass(frozen=True)
class Claim:
    """What a caption of the paired set's grammar says.

    Attributes:
        style: phrase of the style.
        objects: nouns with their articles, adjectives included: one, or two around a relation.
        relation: how the first object lies to the second; "" for one object.
        corner: phrase of the place; "" for the middle.
        background: name of its colour.
    """

    style: str
    objects: tuple[str, ...]
    relation: str
    corner: str
    background: str

    @classmethod
    def read(cls, prompt: str) -> Claim | None:
        """Take a caption apart; None if it is built otherwise."""
        style = next((s for s in STYLE_PHRASES.values() if prompt.startswith(f"{s} ")), None)
        ground = next((g for g in BACKGROUNDS if prompt.endswith(_ground(g))), None)
        if style is None or ground is None:
            return None
        subject = prompt.removeprefix(f"{style} ").removesuffix(_ground(ground))
        corner = next((c for c in CORNERS if subject.endswith(f" {c}")), "")
        subject = subject.removesuffix(f" {corner}")
        for relation in RELATIONS:
            first, found, second = subject.partition(f" {relation} ")
            if found:
                return cls(style, (first, second), relation, corner, ground)
        return cls(style, (subject,), "", corner, ground)

    @property
    def caption(self) -> str:
        """The caption again."""
        subject = f" {self.relation} ".join(self.objects)
        parts = [self.style, subject, self.corner]
        return " ".join(part for part in parts if part) + _ground(self.background)


def _ground(name: str) -> str:
    return f" on {with_article(name)} background"


class Jury:
    """The networks, loaded when they are first asked.

    Args:
        clip: the scorer of captions; the embedded one by default.
    """

    def __init__(self, clip: ClipScorer | None = None):
        self.clip = ClipScorer() if clip is None else clip
        self._read: dict[str, Tensor] = {}

    @cached_property
    def classifier(self) -> Any:
        """Which of 31 objects."""
        from ...privacy.classifiers import load_classifier

        return load_classifier(CNN)

    @cached_property
    def objects(self) -> list[str]:
        """Objects, with their articles, that the embedded CLIP's captions know."""
        return list(json.loads((CLIP / "captions.json").read_text(encoding="utf-8"))["concepts"])

    def shows(self, image: Tensor, claim: Claim) -> Verdict:
        """Whether an image (3, H, W) in [0, 1] shows the one object of a claim, not another."""
        (noun,) = claim.objects
        name = noun.partition(" ")[2] if noun.startswith(("a ", "an ")) else noun
        if name in self.classifier.labels:
            with torch.no_grad(), self.classifier.evaluating():
                best = int(self.classifier(image[None]).argmax())
            return Verdict(self.classifier.label(best) == name, CNN)
        others = [replace(claim, objects=(other,)) for other in self.objects]
        return self.prefers(image, claim, others, BEST)

    def prefers(
        self, image: Tensor, claim: Claim, others: Sequence[Claim], best: int = 1
    ) -> Verdict:
        """Whether a claim's caption is among the `best` first of it and all others."""
        texts = list(dict.fromkeys([claim.caption, *(other.caption for other in others)]))
        new = [text for text in texts if text not in self._read]
        if new:
            self._read.update(zip(new, self.clip.texts(new), strict=True))
        scores = torch.stack([self._read[t] for t in texts]) @ self.clip.images([image])[0]
        return Verdict(int((scores > scores[0]).sum()) < best, TINY_CLIP)


def edit_success(
    output: Tensor, source: str, target: str, kind: str, edited: Mask, jury: Jury
) -> Verdict | None:
    """Whether an edit happened.

    Args:
        output: edited image (3, H, W) in [0, 1].
        source: prompt of the input.
        target: prompt of the edit.
        kind: name of the edit's kind, see `retour.evaluate.suite.KINDS`.
        edited: (H, W) bool, where the true edit differs from the input.
        jury: the networks.

    Returns:
        The verdict; None where nobody here can judge.
    """
    before, after = Claim.read(source), Claim.read(target)
    mask = as_mask(edited, output)
    if kind not in _JUDGES or before is None or after is None or not mask.any():
        return None
    return _JUDGES[kind](output, mask, before, after, jury)


def border_colour(image: Tensor) -> Tensor:
    """Median colour (3,) of the outer two pixels of an image (3, H, W)."""
    frame = torch.ones(image.shape[-2:], dtype=torch.bool, device=image.device)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    return image[:, frame].median(1).values


def apart(image: Tensor) -> Tensor:
    """Where an image (3, H, W) differs from the colour of its border, (H, W) bool."""
    return (image - border_colour(image)[:, None, None]).norm(dim=0) > SAME


def cut_out(image: Tensor, mask: Tensor) -> Tensor:
    """What an image (3, H, W) has under a mask, on a square of its border's colour."""
    ground = border_colour(image)[:, None, None]
    part = region(torch.where(mask, image, ground), mask)
    assert part is not None, "the mask is empty"
    margin = max(1, round(MARGIN * max(part.shape[-2:])))
    height, width = (n + 2 * margin for n in part.shape[-2:])
    out = ground.expand(3, height, width).clone()
    out[:, margin:-margin, margin:-margin] = part
    return out


def vivid_colour(image: Tensor, mask: Tensor) -> str | None:
    """Name of the object colour whose hue most of the vivid pixels under a mask have, if any."""
    rgb = image[:, mask & apart(image)].T.double().cpu().numpy()
    rgb = rgb[(saturation(rgb) > VIVID) & (rgb.max(-1) > DARK)]
    if len(rgb) < LEAST * int(mask.sum()):
        return None
    names = list(OBJECT_COLOURS)
    wanted = np.array([_hue(np.array(OBJECT_COLOURS[name]) / 255) for name in names])
    turns = np.abs(np.array([_hue(colour) for colour in rgb])[:, None] - wanted)
    nearest = np.minimum(turns, 1 - turns).argmin(1)
    return names[int(np.bincount(nearest, minlength=len(names)).argmax())]


def _hue(rgb: np.ndarray) -> float:
    return colorsys.rgb_to_hsv(*rgb)[0]


def _background(image: Tensor, mask: Tensor, _before: Claim, after: Claim, _jury: Jury) -> Verdict:
    median = image[:, mask].median(1).values * 255
    return Verdict(nearest_background(median.cpu().numpy()) == after.background, MEASURED)


def _colour(
    image: Tensor, mask: Tensor, before: Claim, after: Claim, _jury: Jury
) -> Verdict | None:
    words = [
        set(" ".join(claim.objects).split()) & set(OBJECT_COLOURS) for claim in (before, after)
    ]
    new = words[1] - words[0]
    return Verdict(vivid_colour(image, mask) in new, MEASURED) if len(new) == 1 else None


def _removal(image: Tensor, mask: Tensor, _before: Claim, _after: Claim, _jury: Jury) -> Verdict:
    return Verdict(float((~apart(image))[mask].double().mean()) >= CLEARED, MEASURED)


def _position(
    image: Tensor, mask: Tensor, _before: Claim, after: Claim, _jury: Jury
) -> Verdict | None:
    if not after.corner:
        return None
    found = apart(image).nonzero().double()
    if len(found) < LEAST * mask.numel():
        return Verdict(False, MEASURED)
    down, across = (found.mean(0) / torch.tensor(mask.shape) - 0.5).sign().tolist()
    x, y = CORNERS[after.corner]
    return Verdict((across, down) == (np.sign(x - 0.5), np.sign(y - 0.5)), MEASURED)


def _object(
    image: Tensor, _mask: Tensor, _before: Claim, after: Claim, jury: Jury
) -> Verdict | None:
    return jury.shows(image, after) if len(after.objects) == 1 else None


def _addition(
    image: Tensor, mask: Tensor, before: Claim, after: Claim, jury: Jury
) -> Verdict | None:
    new = [noun for noun in after.objects if noun not in before.objects]
    if len(new) != 1:
        return None
    return jury.shows(
        cut_out(image, mask), replace(after, objects=(new[0],), relation="", corner="")
    )


def _style(image: Tensor, _mask: Tensor, _before: Claim, after: Claim, jury: Jury) -> Verdict:
    return jury.prefers(image, after, [replace(after, style=s) for s in STYLE_PHRASES.values()])


_JUDGES: dict[str, Callable[[Tensor, Tensor, Claim, Claim, Jury], Verdict | None]] = {
    "change_object": _object,
    "add_object": _addition,
    "delete_object": _removal,
    "change_attribute_color": _colour,
    "change_background": _background,
    "change_style": _style,
    "change_position": _position,
}
