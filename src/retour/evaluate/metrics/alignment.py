r"""Does an image show what a text says? The cosine of both in a CLIP.

Whole image, and edited region. Conventions of the region:

- ``pie_compat``: as PIE-Bench's evaluator, the 8-bit image with everything else black; cosines
  below 0 count 0.
- ``strict``: the smallest square around the region (as far as the image goes), nothing blackened:
  a CLIP reads black surroundings as part of the scene.

Figures are 100 x the cosine. The published evaluator takes CLIP ViT-L/14: :class:`ClipScorer` of
its folder or hub id. Offline the CLIP that ships with retour stands in, under its own name.

Reference: Hessel et al., "CLIPScore", 2021, arXiv 2104.08718.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import RetourError
from .pixelwise import LEVELS, Convention, Mask, as_mask, check_convention
from .structure import CLIP
from .towers import Source, constants, pretrained, resized, source_name

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
EMOJI = "emoji-clip"


def similarity(images: Tensor, texts: Tensor, convention: Convention = "strict") -> Tensor:
    """100 x the cosine of unit vectors (B, D), pair by pair: (B,); 0 at least in pie_compat."""
    check_convention(convention)
    cosine = 100 * (images * texts).sum(-1)
    return cosine.clamp(min=0) if convention == "pie_compat" else cosine


def region(image: Tensor, edited: Mask, convention: Convention = "strict") -> Tensor | None:
    """The edited part of an image (3, H, W) in [0, 1], see the module; None without any."""
    mask = as_mask(edited, image)
    check_convention(convention)
    if not mask.any():
        return None
    if convention == "pie_compat":
        return image * mask
    (top, bottom), (left, right) = _ends(mask.any(1)), _ends(mask.any(0))
    side = max(bottom - top, right - left)
    rows, columns = _grown(top, bottom, side, len(mask)), _grown(left, right, side, mask.shape[1])
    return image[:, rows, columns]


def _ends(line: Tensor) -> tuple[int, int]:
    marked = line.nonzero().flatten()
    return int(marked[0]), int(marked[-1]) + 1


def _grown(start: int, stop: int, side: int, limit: int) -> slice:
    """A part of a line grown to `side`, as far as the line goes."""
    length = min(side, limit)
    first = min(max((start + stop - length) // 2, 0), limit - length)
    return slice(first, first + length)


class ClipScorer:
    """A CLIP that gives unit vectors of images and texts.

    Args:
        source: folder or hub id of a transformers CLIPModel with its tokenizer; None takes the one
            that ships with retour.

    Raises:
        RetourError: on first use, if the weights are not there.
    """

    def __init__(self, source: Source | None = None):
        self.source = CLIP if source is None else source
        self.name = EMOJI if source is None else source_name(source)

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        from transformers import CLIPModel, CLIPTokenizer

        what = "a CLIP"
        model = pretrained(CLIPModel.from_pretrained, self.source, what, dtype=torch.float32)
        return model.eval(), pretrained(CLIPTokenizer.from_pretrained, self.source, what)

    @cached_property
    def _statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if self.name == EMOJI:
            return (0.5,) * 3, (0.5,) * 3  # trained on images in [-1, 1]
        path = Path(self.source) / "preprocessor_config.json"
        if not path.is_file():
            return CLIP_MEAN, CLIP_STD
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            return tuple(map(float, config["image_mean"])), tuple(map(float, config["image_std"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RetourError(
                f"'{path}' does not say image_mean and image_std: download the CLIP again."
            ) from error

    @torch.no_grad()
    def images(self, images: Sequence[Tensor]) -> Tensor:
        """Images (3, H, W) in [0, 1], of any sizes -> unit vectors (B, D)."""
        model, _ = self._parts
        side = model.config.vision_config.image_size
        batch = torch.stack([_fitted(image, side) for image in images])
        mean, std = (constants(values, batch) for values in self._statistics)
        return _vectors(model.get_image_features(pixel_values=(batch - mean) / std))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> unit vectors (B, D); what is too long is cut."""
        model, tokenizer = self._parts
        limit = model.config.text_config.max_position_embeddings
        options = {"padding": True, "truncation": True, "max_length": limit}
        tokens = tokenizer(list(texts), return_tensors="pt", **options)
        return _vectors(model.get_text_features(**tokens))


def _fitted(image: Tensor, side: int) -> Tensor:
    """The middle square (3, side, side) of an image, bicubic, in 8-bit steps as CLIP's own."""
    x = resized(image[None].float(), side).clamp(0, 1)
    top, left = ((n - side) // 2 for n in x.shape[-2:])
    return ((x * LEVELS).round() / LEVELS)[0, :, top : top + side, left : left + side]


def _vectors(output: Any) -> Tensor:
    # transformers 5 returns an output object where earlier versions return the tensor.
    vectors = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(vectors.float(), dim=-1)
