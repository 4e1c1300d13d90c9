"""What a benchmark measures on: cases, cut into batches of pictures that fit one canvas."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from ..core.cache import content_hash, file_hash
from ..core.model import Model
from ..errors import RetourError, check_range
from ..io import canvas_size
from .suite import Item, Suite

SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Case:
    """One picture and what shall become of it.

    Attributes:
        id: its id, a safe file name.
        kind: name of the edit's type; "" if unknown.
        split: part of the data that it belongs to; "" if unknown.
        source: prompt of the input; None asks the caption proposer.
        target: prompt of the edit.
        image: the input, RGB.
        mask: (H, W) bool, where an edit may change the input; None if nobody says.
        truth: the true edited image, RGB; None where nobody knows it.
        words: the word that the edit concerns in the source and in the target; None if not given.
    """

    id: str
    kind: str
    split: str
    source: str | None
    target: str
    image: Image.Image
    mask: np.ndarray | None = None
    truth: Image.Image | None = None
    words: tuple[str, str] | None = None


class Spec(Protocol):
    """Where a case comes from; its pictures are read when they are asked for."""

    @property
    def id(self) -> str:
        """The case's id."""

    def case(self) -> Case:
        """Read it."""


@dataclass(frozen=True)
class SuiteSpec:
    """A case of a benchmark set."""

    item: Item

    @property
    def id(self) -> str:
        """The item's id."""
        return self.item.id

    def case(self) -> Case:
        """Read it."""
        item = self.item
        return Case(
            id=item.id,
            kind=item.kind,
            split=item.split,
            source=item.source,
            target=item.target,
            image=item.image,
            mask=item.mask(),
            truth=item.edited,
            words=item.words,
        )


def check_id(name: str) -> str:
    """Refuse an id that cannot be a file name on every system."""
    if not SAFE.fullmatch(name):
        raise RetourError(
            f"{name!r} cannot name a file: use ids of letters, digits, dots, dashes and underscores"
        )
    return name


def suite_fingerprint(suite: Suite) -> str:
    """Hash of all that a set says and shows, whatever its folder is called."""
    facts = [
        (i.id, i.type_id, i.source, i.target, i.words, i.runs, i.border, i.split)
        + tuple(file_hash(path) for path in (i.image_path, i.edited_path) if path is not None)
        for i in suite
    ]
    return content_hash(facts)[:16]


def cut(sized: Iterable[tuple[str, tuple[int, int]]], model: Model, size: int) -> list[list[str]]:
    """Batches of ids, at most `size` each, whose pictures share a canvas of the model.

    Args:
        sized: ids with the (width, height) of their pictures; their order is kept in each canvas.
        model: says which canvases there are.
        size: of a batch.
    """
    check_range("batch", size, 1)
    groups: dict[tuple[int, int], list[str]] = {}
    for name, shape in sized:
        canvas = canvas_size(shape, model.native, model.multiple)
        groups.setdefault(canvas, []).append(name)
    return [list(part) for group in groups.values() for part in _slices(group, size)]


def _slices(names: Sequence[str], size: int) -> Iterable[Sequence[str]]:
    return (names[start : start + size] for start in range(0, len(names), size))
