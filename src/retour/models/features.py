"""Finding the modules of a network whose outputs feature hooks may address, in order of execution.

A UNet offers its ResNet blocks, their second convolutions, its attention layers and its blocks; a
transformer the attention layers and the blocks, of each the image's part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any

from torch import nn

from ..core.model import FeatureSite
from .sites import attention_layers

# kind, place, module path, module, factor, part
Found = tuple[str, str, str, nn.Module, int, int]


def unet_features(net: Any) -> list[FeatureSite]:
    """Describe the features of a UNet of diffusers."""
    return _numbered(_of_unet(net))


def transformer_features(stacks: Iterable[tuple[str, nn.Module]], factor: int) -> list[FeatureSite]:
    """Describe the features of a transformer with text and image streams.

    Args:
        stacks: (path, list of blocks), in order of execution; a block returns (text, image).
        factor: latents' edge over the edge of its grid of tokens.
    """
    return _numbered(_of_transformer(stacks, factor))


def _numbered(found: Iterable[Found]) -> list[FeatureSite]:
    listed = list(found)
    totals = Counter(kind for kind, *_ in listed)
    seen: Counter[str] = Counter()
    sites = []
    for kind, place, name, module, factor, part in listed:
        index = seen[kind]
        seen[kind] += 1
        depth = index / totals[kind]
        sites.append(FeatureSite(name, module, kind, place, index, depth, factor, part))
    return sites


def _of_unet(net: Any) -> Iterator[Found]:
    places = [("down", f"down_blocks.{k}", block) for k, block in enumerate(net.down_blocks)]
    if net.mid_block is not None:
        places.append(("mid", "mid_block", net.mid_block))
    places += [("up", f"up_blocks.{k}", block) for k, block in enumerate(net.up_blocks)]
    factor = 1
    for place, path, block in places:
        yield from _of_block(place, path, block, factor)
        if getattr(block, "downsamplers", None) is not None:
            factor *= 2
        elif getattr(block, "upsamplers", None) is not None:
            factor //= 2
        yield "block", place, path, block, factor, 0


def _of_block(place: str, path: str, block: Any, factor: int) -> Iterator[Found]:
    """ResNets and attentions by turns, as they run."""
    pairs = zip_longest(block.resnets, getattr(block, "attentions", None) or ())
    for k, (resnet, attention) in enumerate(pairs):
        if resnet is not None:
            name = f"{path}.resnets.{k}"
            yield "conv", place, f"{name}.conv2", resnet.conv2, factor, 0
            yield "resnet", place, name, resnet, factor, 0
        if attention is not None:
            for _, name, layer in attention_layers([(place, f"{path}.attentions.{k}", attention)]):
                yield "attention", place, name, layer, factor, 0


def _of_transformer(stacks: Iterable[tuple[str, nn.Module]], factor: int) -> Iterator[Found]:
    for path, blocks in stacks:
        for name, block in blocks.named_children():
            where = f"{path}.{name}"
            for _, inner, layer in attention_layers([("block", where, block)]):
                # A single-stream layer returns text and image in one sequence.
                if not getattr(layer, "pre_only", False):
                    yield "attention", "block", inner, layer, factor, 0
            yield "block", "block", where, block, factor, 1
