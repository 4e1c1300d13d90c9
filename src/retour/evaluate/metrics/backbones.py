"""The networks behind metrics, each loaded when it is first used."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ...errors import RetourError
from .alignment import ClipScorer
from .perceptual import CnnTaps, SqueezeTaps, Taps
from .pixelwise import Convention
from .structure import EmojiClip, VitKeys
from .success import Jury
from .towers import Source


@dataclass
class Backbones:
    """Networks of the metrics: the user's, or what ships with retour.

    Attributes:
        structure: folder or hub id of DINO ViT-B/8; None takes `emoji-clip`.
        clip: folder or hub id of a CLIPModel; None takes `emoji-clip`.
        lpips: file of torchvision's squeezenet1_1 weights; None leaves LPIPS out.
        lpips_heads: file of LPIPS's learned weights; None takes torchmetrics' copy.
    """

    structure: Source | None = None
    clip: Source | None = None
    lpips: Source | None = None
    lpips_heads: Source | None = None
    _towers: dict[str, VitKeys | EmojiClip] = field(default_factory=dict, repr=False, compare=False)

    def tower(self, convention: Convention) -> VitKeys | EmojiClip:
        """Of the structure distance."""
        if convention not in self._towers:
            given = self.structure
            self._towers[convention] = EmojiClip() if given is None else VitKeys(given, convention)
        return self._towers[convention]

    @cached_property
    def scorer(self) -> ClipScorer:
        """Of images against texts."""
        return ClipScorer(self.clip)

    @cached_property
    def taps(self) -> Taps:
        """Of the perceptual distance that ships with retour."""
        return CnnTaps()

    @cached_property
    def squeeze(self) -> Taps:
        """Of LPIPS."""
        if self.lpips is None:
            raise RetourError(
                "LPIPS needs weights that do not ship with retour: give the file of torchvision's "
                "squeezenet1_1, or take the metric background_perceptual."
            )
        return SqueezeTaps(self.lpips, self.lpips_heads)

    @cached_property
    def jury(self) -> Jury:
        """Of the success of edits; always the embedded networks, which know its captions."""
        return Jury()

    def __getstate__(self) -> dict[str, Any]:
        kept = ("structure", "clip", "lpips", "lpips_heads")
        return {name: getattr(self, name) for name in kept} | {"_towers": {}}
