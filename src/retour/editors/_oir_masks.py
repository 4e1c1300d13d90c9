"""Where the objects are: masks at the sizes of pictures, latents and CLIP's patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..attention.store import AttentionStore
from ..core.model import Ledger
from ..io import read_image, to_tensor
from ._oir_pairs import Thing
from ._track import watch_source
from .base import EditJob
from .blend import mask_factor, normalised

Size = tuple[int, int]
Key = tuple[str, int]


def pixel_mask(mask: Any, size: Size) -> Tensor:
    """Read a mask as (H, W) bool of that size: white is inside."""
    picture = read_image(mask).convert("L").resize((size[1], size[0]), Image.Resampling.NEAREST)
    return to_tensor(picture.convert("RGB"))[0] > 0


def resized(mask: Tensor, size: Size) -> Tensor:
    """A mask (H, W) at another size, bool: its value at the middle of each place.

    If that finds nothing, the places that are fullest.
    """
    mask = mask.float()[None, None]
    inside = F.interpolate(mask, size, mode="nearest-exact")[0, 0] > 0.5
    if bool(inside.any()):
        return inside
    share = F.interpolate(mask, size, mode="area")[0, 0]
    return share == share.max()


def with_masks(
    job: EditJob,
    found: Mapping[Key, Sequence[Thing]],
    size: Size,
    threshold: float,
    ledger: Ledger,
) -> dict[Key, list[Thing]]:
    """Give every object its mask: its own, the edit's, or where the source looks for its words.

    Args:
        job: the edit.
        found: (target branch, image) -> its objects.
        size: of the pictures.
        threshold: of the normalised attention.
        ledger: where the evaluations of an attention walk are counted.
    """
    masks: dict[tuple[Key, int], Tensor] = {}
    sought = []
    for key, objects in found.items():
        for k, thing in enumerate(objects):
            if thing.pair.mask is not None:
                masks[key, k] = pixel_mask(thing.pair.mask, size)
            elif job.mask is not None and len(objects) == 1:
                masks[key, k] = resized(job.mask[min(key[1], len(job.mask) - 1), 0].cpu(), size)
            else:
                sought.append((key, k))
    store = AttentionStore()
    if sought:
        watch_source(job.model, job.inversion, [store], ledger)
    for key, k in sought:
        factor = mask_factor(job.inversion.latents.shape[-2:])
        heat = store.word("source", key[1], found[key][k].tokens, factor)
        masks[key, k] = normalised(heat.cpu(), size, pool=True) > threshold
    return {
        key: [replace(thing, mask=masks[key, k]) for k, thing in enumerate(objects)]
        for key, objects in found.items()
    }
