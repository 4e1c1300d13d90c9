"""What metrics are given: an edited image, and all that it is judged by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..suite import Item
from .pixelwise import pixels


@dataclass(frozen=True)
class Sample:
    """One edited image and what it is judged by.

    Attributes:
        source: the input, (3, H, W) in [0, 1].
        output: the edited image, of the same shape.
        prompt: what the edit should show.
        edited: (H, W) bool, where an edit may change the image; None if nobody said.
        truth: the true edited image; None where nobody knows it.
        source_prompt: what the input shows.
        kind: name of the edit's kind; "" if unknown.
        ceiling: what the model's encoder and decoder make of the input, of the output's shape;
            None where there is none, or nobody knows it.
    """

    source: Tensor
    output: Tensor
    prompt: str = ""
    edited: Tensor | None = None
    truth: Tensor | None = None
    source_prompt: str = ""
    kind: str = ""
    ceiling: Tensor | None = None

    @classmethod
    def make(
        cls,
        source: Image.Image,
        output: Image.Image,
        *,
        mask: np.ndarray | None = None,
        truth: Image.Image | None = None,
        ceiling: Image.Image | None = None,
        **texts: str,
    ) -> Sample:
        """From pictures and a mask (H, W) bool; `texts` are the other attributes.

        All others are brought to the output's size; pixels of which an edit may
        change a part count as edited.
        """
        size = output.size
        return cls(
            source=pixels(_at(source, size)),
            output=pixels(output),
            edited=None if mask is None else _mask_at(mask, size),
            truth=None if truth is None else pixels(_at(truth, size)),
            ceiling=None if ceiling is None else pixels(_at(ceiling, size)),
            **texts,
        )

    @classmethod
    def of(cls, item: Item, output: Image.Image) -> Sample:
        """What came out for an item of a benchmark set; see `make`."""
        return cls.make(
            item.image,
            output,
            mask=item.mask(),
            truth=item.edited,
            prompt=item.target,
            source_prompt=item.source,
            kind=item.kind,
        )


def _at(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def _mask_at(mask: np.ndarray, size: tuple[int, int]) -> Tensor:
    picture = Image.fromarray(mask.astype(np.float32))
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BOX)
    return torch.from_numpy(np.array(picture) > 0)
