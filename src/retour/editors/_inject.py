"""What editors share that inject a source row's attention or features into the targets' rows."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ..core.branches import Rows
from ..core.model import Condition, FeatureSite, Model
from ..errors import RetourError
from .base import EditJob
from .blend import mask_factor


@lru_cache(maxsize=64)
def lenders(rows: Rows) -> Tensor | None:
    """For each row the one that it borrows from, (R,): the source's row of its half and image.

    A source without that half lends its other row; source rows borrow from themselves. None where
    the call has no source.
    """
    place = {(row.half, row.image): i for i, row in enumerate(rows) if row.branch == "source"}
    if not place:
        return None
    only = {image: i for (_, image), i in place.items()}
    # Kept tensors must be ordinary ones: made under inference mode they would break a gradient.
    with torch.inference_mode(False):
        return torch.tensor(
            [
                i if row.branch == "source" else place.get((row.half, row.image), only[row.image])
                for i, row in enumerate(rows)
            ]
        )


def borrowed(value: Tensor, rows: Tensor, tokens: slice) -> Tensor:
    """Give (R, heads, tokens, d) the `rows` of itself at some of the tokens; out of place."""
    taken = value[rows.to(value.device)]
    return torch.slice_scatter(value, taken[..., tokens, :], -2, tokens.start, tokens.stop)


def embed(job: EditJob, prompt: str) -> Condition:
    """A prompt for every image of the edit, at their size."""
    return job.model.embed([prompt] * job.inversion.images, size=job.inversion.size)


def pushed(scale: float, part: float) -> float:
    """Guidance scale of which a `part` of what lies beyond 1 is left.

    For guidance against a source prompt: what it amplifies is the whole difference that the edit
    makes, not one between a prompt and none.
    """
    return 1 + part * (scale - 1)


def decoder_site(
    model: Model, latent: tuple[int, int], kind: str, *, joint: str, depth: float
) -> FeatureSite:
    """Find the layer of semantic features: the decoder's middle ResNet at a quarter of the edge.

    On Stable Diffusion's 64 x 64 latents that is `up_blocks[1].resnets[1]`, second of three, on
    16 x 16. Where a quarter of the latents' edge is below 8 the resolution nearest to 8 is taken;
    of two ResNets the first. A transformer, of one resolution, gives the `joint` site nearest to
    `depth`.

    Raises:
        RetourError: the model has no such modules.
    """
    sites = model.feature_sites()
    found = [site for site in sites if site.kind == kind and site.place == "up"]
    if found:
        wanted = max(1.0, mask_factor(latent))
        factor = min({s.factor for s in found}, key=lambda f: abs(math.log(f / wanted)))
        level = [site for site in found if site.factor == factor]
        return level[(len(level) - 1) // 2]
    blocks = [site for site in sites if site.kind == joint and site.place == "block"]
    if not blocks:
        raise RetourError(
            f"{model.name!r} offers no features of its decoder: use editor masactrl or p2p"
        )
    return min(blocks, key=lambda site: abs(site.depth - depth))


def attention_after(model: Model, site: FeatureSite) -> list[str]:
    """Names of the attention layers that run after a site in the same place."""
    if site.place == "block":
        names = [layer.name for layer in model.attention_sites()]
        return names[names.index(site.name) + 1 :]
    sites = [other for other in model.feature_sites() if other.place == site.place]
    after = sites[[other.name for other in sites].index(site.name) + 1 :]
    return [other.name for other in after if other.kind == "attention"]
