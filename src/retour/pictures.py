"""What every run that makes pictures returns."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from .io import Clip, Placement, save_clip, save_image, save_json

RECORD_SUFFIX = ".retour.json"


def placements_in(record: Mapping[str, Any]) -> list[Placement]:
    """How the pictures of an inversion go back to their inputs' sizes, where its record says."""
    return [Placement.read(told) for told in record.get("placements", [])]


class Pictures:
    """Pictures with the record of the run that made them.

    Attributes:
        images: the pictures (of a video model: the clips), at the model's size.
        record: facts of the run.
        placements: how each picture goes back to its original size.
    """

    images: list[Any]
    record: dict[str, Any]
    placements: list[Placement]

    @property
    def image(self) -> Any:
        """The first picture."""
        return self.images[0]

    def original_size(self, index: int = 0) -> Any:
        """Picture `index` at the size of the input that it came from."""
        image, restore = self.images[index], self.placements[index].restore
        return image.map(restore) if isinstance(image, Clip) else restore(image)

    def save(self, path: str | PathLike[str], *, index: int = 0, keep_size: bool = False) -> None:
        """Save one picture, and its record beside it as `NAME.retour.json`.

        A PNG carries the record inside as well. A clip becomes an animated PNG, WebP or GIF.
        """
        image = self.original_size(index) if keep_size else self.images[index]
        save = save_clip if isinstance(image, Clip) else save_image
        save(image, path, self.record)
        save_json(self.record, Path(path).with_suffix(RECORD_SUFFIX))
