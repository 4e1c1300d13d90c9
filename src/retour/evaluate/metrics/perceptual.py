r"""Perceptual distance of the background: LPIPS, and substitutes under their own names.

With features :math:`f^l` of a network's layers, normalised over the channels at every place,

.. math:: d(a, b) = \sum_l \frac{1}{|P_l|} \sum_{p \in P_l} w_l \cdot (f^l_p(a) - f^l_p(b))^2,

:math:`w_l` learned ("heads"). Conventions:

- ``pie_compat``: as PIE-Bench's evaluator, both images times :math:`1-m`, plain LPIPS over all
  places; the masked area is black in both.
- ``strict``: the edited pixels of both images are those of the first, so that no difference comes
  from there, and a place counts by its share of background pixels.

LPIPS itself, with SqueezeNet 1.1 as in the published evaluator, needs its weights:
:class:`SqueezeTaps` reads them from the user's file in torchvision's layout. :class:`CnnTaps` is
the substitute that ships with retour, the embedded emoji classifier's feature maps with equal
weights; its figures compare only with each other.

Reference: Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
2018, arXiv 1801.03924.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import RetourError
from .pixelwise import Convention, Mask, background, check_convention
from .towers import Source, constants

TINY = 1e-10
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# Squeeze, expand and input channels of SqueezeNet 1.1's Fire modules, by place in the stack.
FIRES = {
    3: (64, 16, 64),
    4: (128, 16, 64),
    6: (128, 32, 128),
    7: (256, 32, 128),
    9: (256, 48, 192),
    10: (384, 48, 192),
    11: (384, 64, 256),
    12: (512, 64, 256),
}
POOLS = (2, 5, 8)
TAPS = (1, 4, 7, 9, 10, 11, 12)


class Taps(Protocol):
    """A network whose layers are compared."""

    name: str

    def features(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> feature maps (B, C, h, w), one of each layer."""
        ...

    @property
    def heads(self) -> Sequence[Tensor] | None:
        """Weights (C,) of each layer's channels; None weighs channels and layers equally."""
        ...


def perceptual_distance(
    features_a: Sequence[Tensor],
    features_b: Sequence[Tensor],
    heads: Sequence[Tensor] | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Distance of two images' feature maps, see the module.

    Args:
        features_a: maps (B, C, h, w), one of each layer.
        features_b: the same of the other images.
        heads: weights (C,) of each layer; None takes 1 / number of layers.
        weight: what each pixel counts, (B, H, W) at any size; None counts all places alike.

    Returns:
        Distances (B,); NaN where nothing counts.
    """
    total = torch.zeros(len(features_a[0]), device=features_a[0].device)
    for layer, (a, b) in enumerate(zip(features_a, features_b, strict=True)):
        square = (_unit(a) - _unit(b)).square()
        if heads is None:
            gap = square.sum(1) / len(features_a)
        else:
            gap = torch.einsum("bchw,c->bhw", square, heads[layer].to(square))
        total = total + _mean(gap, weight)
    return total


def _unit(x: Tensor) -> Tensor:
    # Under the root, as the published code: a place without features keeps a gradient.
    return x / (x.square().sum(1, keepdim=True) + TINY**2).sqrt().add(TINY)


def _mean(gap: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return gap.mean((1, 2))
    height, width = gap.shape[-2:]
    share = F.adaptive_avg_pool2d(weight[:, None].to(gap), (height, width))[:, 0]
    return (gap * share).sum((1, 2)) / share.sum((1, 2))


def background_distance(
    taps: Taps, a: Tensor, b: Tensor, edited: Mask | None = None, convention: Convention = "strict"
) -> float:
    """Perceptual distance over the background.

    Args:
        taps: the network.
        a: image (3, H, W) in [0, 1].
        b: image of the same shape.
        edited: (H, W) bool, true where pixels do not count; None counts all.
        convention: see the module.

    Returns:
        The distance, or NaN where there is no background.
    """
    keep = background(a, b, edited)
    check_convention(convention)
    if not keep.any():
        return math.nan
    a, b = a.float(), b.float()
    if convention == "pie_compat":
        pair, weight = torch.stack([a * keep, b * keep]), None
    else:
        pair, weight = torch.stack([a, torch.where(keep, b, a)]), keep[None]
    with torch.no_grad():
        maps = taps.features(pair)
        first, second = [m[:1] for m in maps], [m[1:] for m in maps]
        return float(perceptual_distance(first, second, taps.heads, weight))


class CnnTaps:
    """Substitute: feature maps of the emoji classifier that ships with retour, `emoji-cnn`."""

    name = "emoji-cnn perceptual distance"
    heads = None

    @cached_property
    def _classifier(self) -> Any:
        from ...privacy.classifiers import load_classifier

        return load_classifier("emoji-cnn")

    def features(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> maps of the stem and of each block."""
        judge = self._classifier
        x = images.float()
        if x.shape[-2:] != (judge.size, judge.size):
            x = F.interpolate(x, (judge.size, judge.size), mode="bilinear", antialias=True)
        x = (x - constants(judge.mean, x)) / constants(judge.std, x)
        maps = [judge.function.stem(x)]
        for block in judge.function.blocks:
            maps.append(block(maps[-1]))
        return maps


class Fire(nn.Module):
    """A 1 x 1 convolution, then 1 x 1 and 3 x 3 ones side by side."""

    def __init__(self, inside: int, squeezed: int, expanded: int):
        super().__init__()
        self.squeeze = nn.Conv2d(inside, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, inside, h, w) -> (B, 2 expanded, h, w)."""
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], 1))


def squeezenet() -> nn.Sequential:
    """Convolutional part of SqueezeNet 1.1, its parts numbered as in torchvision."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, stride=2), nn.ReLU()]
    for place in range(2, 13):
        pool = place in POOLS
        layers.append(nn.MaxPool2d(3, 2, ceil_mode=True) if pool else Fire(*FIRES[place]))
    return nn.Sequential(*layers)


class SqueezeTaps:
    """LPIPS with SqueezeNet 1.1.

    Args:
        weights: file of the network, .safetensors or .pth, with torchvision's names.
        heads: file of the learned weights, as the lpips package has it; None takes those that come
            with torchmetrics.

    Raises:
        RetourError: on first use, if a file is not there or holds something else.
    """

    name = "LPIPS (SqueezeNet 1.1)"

    def __init__(self, weights: Source, heads: Source | None = None):
        self.weights, self._heads = Path(weights), heads

    @cached_property
    def _net(self) -> nn.Sequential:
        net = squeezenet()
        found = read_tensors(self.weights)
        stack = {k.removeprefix("features."): v for k, v in found.items()}
        wanted = net.state_dict()
        if any(k not in stack or stack[k].shape != v.shape for k, v in wanted.items()):
            raise RetourError(
                f"'{self.weights}' does not hold SqueezeNet 1.1: give torchvision's "
                "squeezenet1_1 weights."
            )
        net.load_state_dict({k: stack[k].float() for k in wanted})
        return net.eval().requires_grad_(False)

    @cached_property
    def heads(self) -> list[Tensor]:
        """Learned weights (C,) of each layer."""
        if self._heads is None:
            path = files(_torchmetrics()) / "functional" / "image" / "lpips_models" / "squeeze.pth"
            with as_file(path) as file:
                found = read_tensors(file)
        else:
            found = read_tensors(Path(self._heads))
        try:
            return [found[f"lin{i}.model.1.weight"].flatten().float() for i in range(len(TAPS))]
        except KeyError as error:
            raise RetourError(
                f"'{self._heads}' does not hold LPIPS's weights (no {error}): give squeeze.pth of "
                "the lpips package."
            ) from None

    def features(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> seven maps."""
        x = images.float() * 2 - 1
        x = (x - constants(SHIFT, x)) / constants(SCALE, x)
        maps = []
        for place, layer in enumerate(self._net):
            x = layer(x)
            if place in TAPS:
                maps.append(x)
        return maps


def _torchmetrics() -> str:
    from importlib.util import find_spec

    if find_spec("torchmetrics") is None:
        raise RetourError(
            'LPIPS needs its learned weights: pip install "retour[eval]", or give their file.'
        )
    return "torchmetrics"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a .pth one that holds nothing else."""
    if not path.is_file():
        raise RetourError(f"there is no file '{path}': give the file of the weights.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make the readers raise nearly any type
        raise RetourError(
            f"'{path}' cannot be read as weights ({type(error).__name__}): download it again."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise RetourError(f"'{path}' holds more than named tensors: give a file of weights.")
    return found
