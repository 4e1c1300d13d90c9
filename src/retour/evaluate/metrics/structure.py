r"""Structure distance: do two images have the same layout?

The mean square difference of two self-similarity matrices of patch features,
:math:`S_{ij} = \cos(f_i, f_j)`, norms floored at 1e-8, over the whole image.

- :class:`VitKeys`: the published choice. Features are the keys of the last block of DINO ViT-B/8,
  all heads side by side, class token included; the shorter side is brought to 224 pixels, the
  longer to 480 at most. ``strict`` feeds images in [0, 1] to ImageNet's normalisation;
  ``pie_compat`` feeds 0..255, as the published evaluator does, whose figures depend on it. We
  resize with antialiasing; what torchvision does by default has changed between its versions.
- :class:`EmojiClip`: a substitute that needs no download. Its figures compare only with each other.

Reference: Tumanyan et al., 2022, arXiv 2201.00424.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import RetourError
from .pixelwise import Convention, check_convention
from .towers import Source, constants, pretrained, resized, source_name

NORM_FLOOR = 1e-8
CLIP = Path(__file__).parents[2] / "weights" / "clip"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Of the longest to the shorter side, 480 to 224.
LONGEST = 480 / 224


def self_similarity(features: Tensor) -> Tensor:
    """Cosines between all pairs of features (..., N, D): (..., N, N)."""
    norms = features.norm(dim=-1)
    products = (norms[..., :, None] * norms[..., None, :]).clamp(min=NORM_FLOOR)
    return features @ features.transpose(-1, -2) / products


def structure_distance(features_a: Tensor, features_b: Tensor) -> Tensor:
    """Mean square difference of the self-similarities of features (..., N, D): (...)."""
    gap = self_similarity(features_a) - self_similarity(features_b)
    return gap.square().mean((-2, -1))


class EmojiClip:
    """Substitute backbone of the structure distance: the embedded CLIP's vision tower.

    Features are the last layer's patch tokens, without the class token.

    Args:
        folder: a transformers CLIPModel.

    Raises:
        RetourError: on first use, if the weights are not there.
    """

    name = "emoji-clip structure distance"

    def __init__(self, folder: Path = CLIP):
        self.folder = Path(folder)

    @property
    def available(self) -> bool:
        """Whether the weights are there."""
        return (self.folder / "config.json").is_file()

    @cached_property
    def _tower(self) -> Any:
        if not self.available:
            raise RetourError(f"there is no CLIP in '{self.folder}': give a CLIPModel's folder")
        from transformers import CLIPModel

        model = pretrained(CLIPModel.from_pretrained, self.folder, "a CLIP", dtype=torch.float32)
        return model.vision_model.eval()

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> patch tokens (B, N, D)."""
        side = self._tower.config.image_size
        if images.shape[-2:] != (side, side):
            images = torch.nn.functional.interpolate(
                images, (side, side), mode="bicubic", antialias=True
            )
        # Trained on images in [-1, 1].
        hidden = self._tower(pixel_values=images.float() * 2 - 1).last_hidden_state
        return hidden[:, 1:]

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Structure distance of images (B, 3, H, W) in [0, 1], pair by pair: (B,)."""
        return structure_distance(self.features(a), self.features(b))


class VitKeys:
    """Keys of a vision transformer's last block, for the published structure distance.

    Args:
        source: folder or hub id of a transformers ViTModel, such as DINO ViT-B/8.
        convention: the scale of the images that it is fed, see the module.

    Raises:
        RetourError: on first use, if the weights are not there.
    """

    def __init__(self, source: Source, convention: Convention = "strict"):
        check_convention(convention)
        self.source, self.convention = source, convention
        self.name = f"{source_name(source)} key structure distance"

    @cached_property
    def _tower(self) -> tuple[Any, Any]:
        from transformers import ViTModel

        options = {"add_pooling_layer": False, "dtype": torch.float32}
        model = pretrained(ViTModel.from_pretrained, self.source, "a ViT", **options).eval()
        names = ("k_proj", "key")  # of transformers 5, and before
        keys = [part for name, part in model.named_modules() if name.split(".")[-1] in names]
        return model, keys[-1]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> keys (B, 1 + N, D), the class token's first."""
        model, last = self._tower
        side = model.config.image_size
        x = resized(images.float(), side, round(LONGEST * side), mode="bilinear")
        x = x * 255 if self.convention == "pie_compat" else x
        x = (x - constants(IMAGENET_MEAN, x)) / constants(IMAGENET_STD, x)
        kept: list[Tensor] = []
        hook = last.register_forward_hook(lambda _module, _inputs, keys: kept.append(keys))
        try:
            model(pixel_values=x, interpolate_pos_encoding=True)
        finally:
            hook.remove()
        return kept[0]

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Structure distance of images (B, 3, H, W) in [0, 1], pair by pair: (B,)."""
        return structure_distance(self.features(a), self.features(b))
