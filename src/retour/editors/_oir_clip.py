"""How well a part of a picture fits a phrase: CLIP whose image side sees that part only.

In every layer of the image tower no place attends to patches outside of the mask (their scores are
minus infinity); the class token is always seen. The published code *adds* a matrix of zeros and
ones to the scores, so that what is outside still leaks in: ``mask_mode="additive01"`` does so too.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import RetourError, unknown
from ._oir_masks import resized

MaskMode = Literal["exclude", "additive01"]
MASK_MODES = ("exclude", "additive01")


class Scorer(Protocol):
    """How well pictures fit a phrase inside a mask."""

    def __call__(self, pictures: Tensor, phrase: str, mask: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [-1, 1] and a mask (H, W) in [0, 1] -> scores (N,)."""


class MaskedCLIP:
    """The cosine of a phrase and a picture's masked part, by any transformers CLIP.

    Args:
        model: a `transformers.CLIPModel`, in eval mode.
        tokenizer: its tokenizer.
        mean: what its pixels, in [0, 1], are centred by, three numbers or one.
        std: what they are divided by.
        mask_mode: see the module.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        mean: Any = 0.5,
        std: Any = 0.5,
        mask_mode: MaskMode = "exclude",
    ):
        if mask_mode not in MASK_MODES:
            raise unknown("mask_mode", mask_mode, MASK_MODES)
        self.model, self.tokenizer, self.mask_mode = model, tokenizer, mask_mode
        vision = model.config.vision_config
        self.side, self.patches = vision.image_size, vision.image_size // vision.patch_size
        self.mean, self.std = (torch.as_tensor(v).reshape(-1, 1, 1).float() for v in (mean, std))

    @classmethod
    def from_folder(cls, folder: str | Path, mask_mode: MaskMode = "exclude") -> MaskedCLIP:
        """Read a transformers CLIP folder; pixels are centred as its preprocessor config says."""
        from transformers import AutoTokenizer, CLIPModel

        from ..models.quiet import quietly

        if not (Path(folder) / "config.json").is_file():
            raise RetourError(f"there is no CLIP at '{folder}': name a folder of transformers")
        try:
            with quietly():
                model = CLIPModel.from_pretrained(folder, use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            said = str(error).splitlines()[0]
            raise RetourError(f"cannot read a CLIP from '{folder}' ({said})") from error
        told = Path(folder) / "preprocessor_config.json"
        facts = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
        model = model.float().eval().requires_grad_(False)
        mean, std = facts.get("image_mean", 0.5), facts.get("image_std", 0.5)
        return cls(model, tokenizer, mean, std, mask_mode)

    @torch.no_grad()
    def __call__(self, pictures: Tensor, phrase: str, mask: Tensor) -> Tensor:
        """Cosines (N,)."""
        return self.embed_images(pictures, mask) @ self.embed_text(phrase)

    def embed_text(self, phrase: str) -> Tensor:
        """A phrase -> unit vector (D,)."""
        tokens = self.tokenizer([phrase], padding=True, truncation=True, return_tensors="pt")
        return _unit(self.model.get_text_features(**tokens))[0]

    def embed_images(self, pictures: Tensor, mask: Tensor) -> Tensor:
        """Pictures (N, 3, H, W) in [-1, 1], seen through a mask (H, W) -> unit vectors (N, D)."""
        size = (self.side, self.side)
        pixels = F.interpolate(pictures.float(), size, mode="bicubic", antialias=True)
        pixels = (pixels / 2 + 0.5 - self.mean) / self.std
        tower = self.model.vision_model
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        seen = self.bias(mask).to(hidden)
        out = tower.encoder(inputs_embeds=hidden, attention_mask=seen)
        pooled = tower.post_layernorm(out.last_hidden_state[:, 0])
        return _unit(self.model.visual_projection(pooled))

    def bias(self, mask: Tensor) -> Tensor:
        """What is added to the attention scores, (1, 1, L, L) for L = 1 + patches."""
        seen = torch.cat([torch.ones(1, dtype=torch.bool), self.seen(mask).flatten()])
        if self.mask_mode == "additive01":
            return (seen[:, None] & seen[None]).float()[None, None]
        hidden = torch.zeros(len(seen)).masked_fill(~seen, -torch.inf)
        return hidden.expand(1, 1, len(seen), -1)

    def seen(self, mask: Tensor) -> Tensor:
        """Patches in the mask, (p, p)."""
        return resized(mask, (self.patches, self.patches))


def _unit(output: Any) -> Tensor:
    # transformers 5 returns an output object where earlier versions return the tensor.
    vectors = output if isinstance(output, Tensor) else output.pooler_output
    return F.normalize(vectors.float(), dim=-1)


@lru_cache(2)
def embedded(mask_mode: MaskMode = "exclude") -> MaskedCLIP:
    """The CLIP that ships with retour."""
    from ..captions import captioner

    known = captioner()
    return MaskedCLIP(known.model, known.tokenizer, mask_mode=mask_mode)
