"""How far a picture is from the one it was made from: in pixels, in structure, in meaning.

Meaning is judged by the embedded tiny CLIP and structure by its vision tower; both stand in for
larger backbones, so these figures compare only with each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from PIL import Image

from ..captions import captioner
from ..evaluate.metrics import EmojiClip, pixels, psnr
from ..models.quiet import quietly

Table = dict[str, list[float]]


@lru_cache(1)
def _structure() -> EmojiClip:
    return EmojiClip()


@torch.no_grad()
def distances(
    pictures: Sequence[Image.Image], originals: Sequence[Image.Image], captions: Sequence[str]
) -> Table:
    """Figures of B pictures against their originals of the same size.

    Args:
        pictures: what is judged.
        originals: what they were made from.
        captions: what the originals show; an empty one has no cosine.

    Returns:
        Lists of B figures: `psnr` in dB, `structure` distance (0: the same), `clip_image`, the
        cosine with the original's embedding, and `clip_caption`, that with the caption's.
    """
    found, wanted = ([pixels(p) for p in some] for some in (pictures, originals))
    clip = captioner()
    seen, original = clip.embed_images(pictures), clip.embed_images(originals)
    words = clip.embed_texts([c or "a picture" for c in captions])
    said = (seen * words).sum(1).tolist()
    with quietly():
        structure = _structure().distance(torch.stack(found), torch.stack(wanted))
    return {
        "psnr": [psnr(a, b) for a, b in zip(found, wanted, strict=True)],
        "structure": structure.tolist(),
        "clip_image": (seen * original).sum(1).tolist(),
        "clip_caption": [
            cosine if caption else float("nan")
            for cosine, caption in zip(said, captions, strict=True)
        ],
    }
