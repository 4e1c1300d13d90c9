"""The two small image classifiers that ship with retour: a residual CNN and a vision transformer.

They share nothing but their task, so that what fools one of them tells something about the other.
Both take normalised images (B, 3, H, W) and give logits (B, K).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 8


class Residual(nn.Module):
    """Two 3 x 3 convolutions around a shortcut; the first one halves the image."""

    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.shortcut = nn.Conv2d(inside, outside, 1)
        self.first = nn.Conv2d(inside, outside, 3, stride=2, padding=1)
        self.second = nn.Conv2d(outside, outside, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, w) for w in (inside, outside))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, inside, H, W) -> (B, outside, H/2, W/2)."""
        h = self.first(F.silu(self.norms[0](x)))
        h = self.second(F.silu(self.norms[1](h)))
        return h + self.shortcut(F.avg_pool2d(x, 2))


class ConvNet(nn.Module):
    """Residual CNN.

    Args:
        classes: number of classes K.
        widths: channels after the stem and after each halving block; multiples of 8.
    """

    def __init__(self, classes: int, widths: Sequence[int] = (24, 40, 72, 112)):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        pairs = zip(widths, widths[1:], strict=False)
        self.blocks = nn.Sequential(*[Residual(a, b) for a, b in pairs])
        self.norm = nn.GroupNorm(GROUPS, widths[-1])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> logits (B, K)."""
        h: Tensor = F.silu(self.norm(self.blocks(self.stem(x))))
        return self.head(h.mean((2, 3)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, ratio: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) -> the same shape."""
        parts = self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(seen)
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class VisionTransformer(nn.Module):
    """Vision transformer on patches of 8 x 8, averaged over its tokens.

    Three convolutions cut the patches, which a small transformer learns from sooner than from one.

    Args:
        classes: number of classes K.
        side: of the images, in pixels.
        width: of the tokens.
        depth: blocks.
        heads: of the attention.
        ratio: width of the hidden layer over `width`.
    """

    def __init__(
        self,
        classes: int,
        side: int = 64,
        width: int = 96,
        depth: int = 4,
        heads: int = 4,
        ratio: int = 2,
    ):
        super().__init__()
        widths = (3, width // 4, width // 2, width)
        cuts = [nn.Conv2d(a, b, 4, 2, 1) for a, b in zip(widths, widths[1:], strict=False)]
        self.patches = nn.Sequential(cuts[0], nn.GELU(), cuts[1], nn.GELU(), cuts[2])
        self.places = nn.Parameter(0.02 * torch.randn((side // 8) ** 2, width))
        self.blocks = nn.Sequential(*[Block(width, heads, ratio) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, side, side) -> logits (B, K)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(tokens)).mean(1))


ARCHITECTURES: dict[str, type[nn.Module]] = {"cnn": ConvNet, "vit": VisionTransformer}
