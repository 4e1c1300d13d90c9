"""Pictures of the page as data URIs, as many as its size allows.

Small pictures are kept exactly (lossless WebP); larger ones are scaled down to `SIDE` and
compressed, as the page shows none larger. Nothing of the files but their pixels is kept.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import RetourError
from ...io import read_image, read_record
from .folder import ATTENTION, INPUTS, MASKS, TRUTH, Bench, Edit

SIDE = 256
QUALITY = 82
FAST = {
    "method": 2,
    "quality": 0,
}  # Of lossless files: a fifth of the usual time for 5 % more bytes.
DIM, EDGE = (16, 19, 24, 140), (255, 255, 255, 255)
EDGE_SHADE = (0, 0, 0, 255)


def in_turns(edits: Sequence[Edit]) -> list[int]:
    """Places of edits, one of each kind in turn, so that any first part shows every kind."""
    by_kind: dict[str, list[int]] = {}
    for k, edit in enumerate(edits):
        by_kind.setdefault(edit.kind, []).append(k)
    return [k for k in chain.from_iterable(zip_longest(*by_kind.values())) if k is not None]


def gallery(bench: Bench, limit: int) -> dict[int, dict[str, Any]]:
    """Pictures of as many edits as fit, taken in turns from each kind.

    Args:
        bench: what was run.
        limit: bytes that they may take as JSON, together.

    Returns:
        Place of the edit -> input, truth, mask, runs, attention as data URIs (None where there is
        none), and the words that the attention of each run is of; by place.

    Raises:
        RetourError: a picture is missing or damaged, whether or not it would have fitted.
    """
    bench.check_pictures()
    found, left = {}, limit
    for k in in_turns(bench.edits):
        pictures = _pictures(bench, k)
        left -= len(json.dumps(pictures))
        if left < 0:
            break
        found[k] = pictures
    return dict(sorted(found.items()))


def _pictures(bench: Bench, item: int) -> dict[str, Any]:
    name = bench.edits[item].id
    mask, attention = bench.picture(MASKS, name), _attention(bench, name)
    outputs = [bench.images.get((run, item)) for run in range(len(bench.runs))]
    return {
        "input": _uri(bench.picture(INPUTS, name)),
        "truth": _uri(bench.picture(TRUTH, name)),
        "mask": None if mask is None else data_uri(mask_overlay(read_image(mask))),
        "runs": [_uri(path) for path in outputs],
        "attention": [_uri(path) for path in attention],
        "words": [_words(path) for path in attention],
    }


def _attention(bench: Bench, item: str) -> list[Path | None]:
    """Overlays of each run, for there may be some of a few items only."""
    paths = [attention_path(bench, run.label, item) for run in bench.runs]
    return [path if path.is_file() else None for path in paths]


def attention_path(bench: Bench, label: str, item: str) -> Path:
    """Where the overlay of a run's output lies."""
    return bench.inside(f"{ATTENTION}/{label}/{item}.png")


def _words(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return ", ".join(str(word) for word in read_record(path).get("words", ()))
    except RetourError:
        return ""  # Overlays may come from elsewhere, without a record.


def _uri(path: Path | None) -> str | None:
    return None if path is None else data_uri(read_image(path))


def data_uri(image: Image.Image) -> str:
    """A picture as a WebP data URI: exact up to `SIDE` pixels, scaled and compressed above."""
    buffer = io.BytesIO()
    if max(image.size) <= SIDE:
        image.save(buffer, "WEBP", lossless=True, **FAST)
    else:
        small = image.copy()
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        small.save(buffer, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def mask_overlay(mask: Image.Image) -> Image.Image:
    """A mask (white: may change) as a layer: the rest dimmed, a black and white edge around it.

    What may change is what one looks at, so nothing lies over it: a tint would change its colours.
    """
    inside = np.asarray(mask.convert("L")) > 127
    grown = np.pad(inside, 1, mode="edge")
    near = grown[:-2, 1:-1] | grown[2:, 1:-1] | grown[1:-1, :-2] | grown[1:-1, 2:]
    edge = near & ~inside
    layer = np.zeros((*inside.shape, 4), np.uint8)
    layer[~inside] = DIM
    # Alternating, the edge shows on any ground.
    checks = np.indices(inside.shape).sum(0) // 2 % 2 == 0
    layer[edge & checks] = EDGE
    layer[edge & ~checks] = EDGE_SHADE
    return Image.fromarray(layer)
