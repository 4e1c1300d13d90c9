"""Benchmark sets in PIE-Bench's format: the real one, and the paired set that ships with retour.

A folder holds `mapping_file.json`, which maps an id to

    image_path, original_prompt, editing_prompt, editing_instruction, editing_type_id,
    blended_word, mask

and `annotation_images/<image_path>`. The mask is a flat list [start, length, start, length,
...] of runs over the image in row-major order; it marks the pixels that an edit may change.
Square brackets in prompts mark the words that differ, and are stripped. Ids serve as file names of
results, so they hold letters, digits, dots, dashes and underscores alone. `blended_word` is
"source-word target-word", or "". The paired set adds `edited_image_path` (inside
`edited_images/`): the *true* edited image, equal to the source outside the mask; and `split`,
the part of the data whose concepts it shows.

Reference: Ju et al., "Direct Inversion: Boosting Diffusion-based Editing with 3 Lines of Code",
2023, arXiv 2310.01506.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import chain, zip_longest
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import RetourError, unknown
from ..io import read_image

MAPPING = "mapping_file.json"
IMAGES = "annotation_images"
EDITED = "edited_images"
KINDS = {
    "0": "random",
    "1": "change_object",
    "2": "add_object",
    "3": "delete_object",
    "4": "change_attribute_content",
    "5": "change_attribute_pose",
    "6": "change_attribute_color",
    "7": "change_attribute_material",
    "8": "change_background",
    "9": "change_style",
    "10": "change_position",
}
PUBLIC = "public"
SPLITS = {PUBLIC: "paired", "test": "paired-test"}
SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
LARGEST_MAPPING = 256 * 2**20
_TEXTS = ("image_path", "original_prompt", "editing_prompt")


def encode_mask(mask: np.ndarray) -> list[int]:
    """Runs [start, length, ...] of a mask (H, W) bool, row-major."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.ravel().astype(np.int8), [0]])))
    starts, ends = edges[::2], edges[1::2]
    return [int(v) for v in np.stack([starts, ends - starts], 1).ravel()]


def decode_mask(
    runs: Sequence[int], height: int, width: int, *, border: bool = False
) -> np.ndarray:
    """Mask (height, width) bool of runs; what runs over the end of the image is cut.

    Args:
        runs: [start, length, start, length, ...].
        height: of the image.
        width: of the image.
        border: mark the outermost pixels too, as the published evaluator does.
    """
    flat = np.zeros(height * width, bool)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        flat[start : start + length] = True
    mask = flat.reshape(height, width)
    if border:
        mask[[0, -1], :] = mask[:, [0, -1]] = True
    return mask


@dataclass(frozen=True)
class Item:
    """One edit of a set.

    Attributes:
        id: its id, always a string (leading zeros matter).
        type_id: PIE-Bench's number of the edit's type, as a string.
        source: prompt of the input, brackets stripped.
        target: prompt of the edit, brackets stripped.
        words: the word that the edit concerns in the source and in the target; None if not given.
        instruction: the edit as an order; "" if not given.
        image_path: file of the input.
        edited_path: file of the true edited image; None where nobody knows it.
        runs: the mask as runs.
        border: whether the outermost pixels count as editable in any case.
        split: part of the data that its concepts belong to; "" if unknown.
    """

    id: str
    type_id: str
    source: str
    target: str
    words: tuple[str, str] | None
    instruction: str
    image_path: Path
    edited_path: Path | None
    runs: tuple[int, ...]
    border: bool = False
    split: str = ""

    @property
    def kind(self) -> str:
        """Name of the edit's type."""
        return KINDS.get(self.type_id, self.type_id)

    @property
    def image(self) -> Image.Image:
        """The input, RGB."""
        return read_image(self.image_path)

    @property
    def edited(self) -> Image.Image | None:
        """The true edited image, RGB; None where nobody knows it."""
        return None if self.edited_path is None else read_image(self.edited_path)

    def mask(self) -> np.ndarray:
        """Where an edit may change the image, (H, W) bool at the input's size."""
        width, height = self.image.size
        return decode_mask(self.runs, height, width, border=self.border)


@dataclass(frozen=True)
class Suite:
    """A benchmark set; images are read when they are asked for."""

    name: str
    items: tuple[Item, ...]

    @classmethod
    def load(cls, folder: str | PathLike[str], *, border: bool = False) -> Suite:
        """Read a set in PIE-Bench's format.

        Args:
            folder: holds `mapping_file.json` and `annotation_images`.
            border: PIE-Bench's rule that the outermost pixels are always editable.

        Raises:
            RetourError: the folder is not such a set, or a part of it is missing or damaged.
        """
        folder = Path(folder)
        mapping = _read_mapping(folder)
        items = tuple(_item(folder, str(key), entry, border) for key, entry in mapping.items())
        return cls(folder.resolve().name, items)

    @classmethod
    def paired(cls, split: str = PUBLIC) -> Suite:
        """The set that ships with retour: emoji scenes whose true edited image is known.

        Args:
            split: `public`, or `test`: as many other edits, by which no default was chosen.

        Raises:
            RetourError: there is no such split.
        """
        if split not in SPLITS:
            raise unknown("split of the paired set", split, SPLITS)
        shipped = cls.load(Path(str(files("retour") / "paired" / split)))
        return replace(shipped, name=SPLITS[split])

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def select(self, kinds: Sequence[str] | None = None, limit: int | None = None) -> Suite:
        """Keep some kinds of edit, and at most `limit` items, taken in turns from each kind."""
        present = list(dict.fromkeys(item.kind for item in self.items))
        for kind in kinds or ():
            if kind not in present:
                raise unknown("kind of edit", kind, present)
        wanted = present if kinds is None else list(kinds)
        groups = [[item for item in self.items if item.kind == kind] for kind in wanted]
        turns = [item for item in chain(*zip_longest(*groups)) if item is not None]
        return replace(self, items=tuple(turns[:limit]))


def _read_mapping(folder: Path) -> Mapping[str, Any]:
    path = folder / MAPPING
    try:
        if path.stat().st_size > LARGEST_MAPPING:
            raise RetourError(
                f"'{path}' has {path.stat().st_size:,} bytes, no benchmark set needs more than "
                f"{LARGEST_MAPPING:,}: download the set again."
            )
        mapping = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RetourError(
            f"'{folder}' is not a benchmark set: it has no {MAPPING}; name the folder that has it."
        ) from None
    except RetourError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise RetourError(f"cannot read '{path}' ({error}): download the set again.") from error
    if not isinstance(mapping, dict) or not mapping:
        raise RetourError(f"'{path}' maps no ids to edits: download the set again.")
    return mapping


def _item(folder: Path, key: str, entry: Any, border: bool) -> Item:
    where = f"entry {key!r} of '{folder / MAPPING}'"
    if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in _TEXTS):
        raise RetourError(f"{where} lacks one of {', '.join(_TEXTS)}: download the set again.")
    if not SAFE_ID.fullmatch(key):
        raise RetourError(
            f"{where} cannot be a file name: use letters, digits, dots, dashes and underscores."
        )
    if not plain_prompt(entry["editing_prompt"]):
        raise RetourError(f"{where} has an empty editing_prompt: say what the edit shall show.")
    type_id = str(entry.get("editing_type_id"))
    if type_id not in KINDS:
        raise RetourError(
            f"{where} has the editing_type_id {type_id!r}: it must be one of {', '.join(KINDS)}."
        )
    edited = entry.get("edited_image_path")
    return Item(
        id=key,
        type_id=type_id,
        source=plain_prompt(entry["original_prompt"]),
        target=plain_prompt(entry["editing_prompt"]),
        words=_words(entry.get("blended_word", "")),
        instruction=str(entry.get("editing_instruction", "")),
        image_path=_inside(folder / IMAGES, entry["image_path"], where),
        edited_path=None if edited is None else _inside(folder / EDITED, edited, where),
        runs=_runs(entry.get("mask"), where),
        border=border,
        split=str(entry.get("split", "")),
    )


def plain_prompt(prompt: str) -> str:
    """A prompt without the square brackets that mark differing words, single-spaced."""
    return " ".join(prompt.replace("[", "").replace("]", "").split())


def _words(blended: Any) -> tuple[str, str] | None:
    words = plain_prompt(str(blended)).split()
    return (words[0], words[1]) if len(words) == 2 else None


def _inside(folder: Path, name: Any, where: str) -> Path:
    path = folder / str(name)
    try:
        inside, there = path.resolve().is_relative_to(folder.resolve()), path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # zero bytes, endless names, looped links
        raise RetourError(
            f"{where} names a file that cannot be ({str(name)[:80]!r}): get the set again."
        ) from error
    if not inside:
        raise RetourError(f"{where} points outside of its folder ({name!r}): distrust this set.")
    if not there:
        raise RetourError(f"{where} names '{path}', which does not exist: get the set again.")
    return path


def _runs(mask: Any, where: str) -> tuple[int, ...]:
    whole = isinstance(mask, list) and all(type(v) is int and v >= 0 for v in mask)
    if not whole or len(mask) % 2:
        raise RetourError(
            f"the mask of {where} is not a list [start, length, ...] of whole numbers: "
            "download the set again."
        )
    return tuple(mask)
