r"""LazyDrag's attention: background replaced, identity appended, output refined.

The source is a branch of the same call, standing on its inverted trajectory; its conditional row's
queries, keys, values and outputs (:math:`\bar q, \bar k, \bar v, \bar y`) are what the paper caches
while inverting. They serve every row of a target, the unconditional one too. What moved may be read
from another branch, on which it stands at its new place already (:mod:`._drag_carry`). With the map
of :mod:`._drag_map`, for image tokens :math:`x`,

- background: :math:`q_x, k_x, v_x \leftarrow \bar q_x, \bar k_x, \bar v_x`, in all steps;
- identity, until `identity_until` of the steps: for :math:`x` at destinations and in the
  transition one more token each, :math:`\bar k_{M(x)}` as if it stood at :math:`x`, and
  :math:`\bar v_{M(x)}`; only image queries there may look at it (or all image queries);
- output, until `blend_until`: at destinations :math:`y_x \leftarrow (1 - g_x) y_x + g_x \bar
  y_{M(x)}`, :math:`g_x = h\,A(x)`, before the layer's out-projection.

Keys carry a rotary embedding in FLUX: the one of the place they come from is taken off and that
of :math:`x` put on, both rotations. Where positions are added to the tokens instead (SD3), a key
tells of the place it comes from, and is appended as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..attention.control import AttentionCall, AttentionControl, Rotary
from ..core.grid import Step
from ..core.model import AttentionSite
from ._drag_map import DragMap

Key = tuple[str, int]
Queries = Literal["moved", "image"]


class _Corresponding(AttentionControl):
    """Knows the maps and the rows they belong to.

    Args:
        maps: (target branch, image) -> its map.
        sites: names of the layers to control.
        reference: the branch that is read.
    """

    def __init__(
        self, maps: Mapping[Key, DragMap], sites: frozenset[str], reference: str = "source"
    ):
        self.maps, self.sites, self.reference = dict(maps), sites, reference

    def wants(self, site: AttentionSite) -> bool:
        """The layers it was told."""
        return site.name in self.sites

    def active(self, call: AttentionCall) -> bool:
        """On the way down."""
        return call.step is not None and call.step.down

    def rows(self, call: AttentionCall) -> tuple[list[Key], Tensor, Tensor]:
        """Targets' rows of this call: their keys, indices, and those of the rows they read."""
        place = call.rows.conditional()
        found = [
            ((row.branch, row.image), k, place[self.reference, row.image])
            for k, row in enumerate(call.rows)
            if (row.branch, row.image) in self.maps
        ]
        target, origin = (torch.tensor([f[n] for f in found], dtype=torch.long) for n in (1, 2))
        return [f[0] for f in found], target, origin

    def stacked(self, name: str, keys: Sequence[Key], like: Tensor) -> Tensor:
        """(rows, N) of one tensor of the maps, on `like`'s device."""
        return torch.stack([getattr(self.maps[key], name) for key in keys]).to(like.device)


class Background(_Corresponding):
    """Targets see the background as the source does."""

    def qkv(
        self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Replace the background's image tokens."""
        keys, target, origin = self.rows(call)
        keep = self.stacked("background", keys, q)[:, None, :, None]

        def replaced(x: Tensor) -> Tensor:
            rows, sources = target.to(x.device), origin.to(x.device)
            image = torch.where(keep, x[sources][..., call.image, :], x[rows][..., call.image, :])
            return _with_image(call, x, rows, image)

        return replaced(q), replaced(k), replaced(v)


class Identity(_Corresponding):
    """What moved finds its origin's keys and values at its new place.

    Args:
        maps: (target branch, image) -> its map.
        sites: names of the layers to control.
        until: fraction of the steps.
        queries: who may look: image tokens where something moved, or all of them.
        reference: the branch that is read.
    """

    def __init__(
        self,
        maps: Mapping[Key, DragMap],
        sites: frozenset[str],
        until: float,
        queries: Queries = "moved",
        reference: str = "source",
    ):
        super().__init__(maps, sites, reference)
        self.until, self.queries = until, queries

    def active(self, call: AttentionCall) -> bool:
        """In the first steps."""
        return super().active(call) and done(call.step) < self.until

    def qkv(
        self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Append one token for every image token; `logits` closes those that are none."""
        keys, target, origin = self.rows(call)
        index = self.stacked("source", keys, k)
        more_k, more_v = (x[..., call.image, :] for x in (k, v))
        taken = _at(more_k[origin.to(k.device)], index)
        if call.rotary is not None:
            cos, sin = (part.to(k.device)[call.image] for part in call.rotary)
            taken = turned(taken, (cos[index][:, None], sin[index][:, None]), back=True)
            taken = turned(taken, (cos, sin))
        more_k = more_k.index_copy(0, target.to(k.device), taken.to(k.dtype))
        values = _at(more_v[origin.to(v.device)], index)
        more_v = more_v.index_copy(0, target.to(v.device), values)
        return q, torch.cat([k, more_k], -2), torch.cat([v, more_v], -2)

    def logits(self, call: AttentionCall, logits: Tensor) -> Tensor:
        """Only the allowed queries see the appended tokens, and only those of moved places."""
        keys, target, _ = self.rows(call)
        moved = self.stacked("destination", keys, logits) | self.stacked("transition", keys, logits)
        old = logits.shape[-1] - call.pixels
        allowed = logits.new_zeros(logits.shape[0], *logits.shape[-2:], dtype=torch.bool)
        allowed[..., :old] = True
        looking = moved if self.queries == "moved" else torch.ones_like(moved)
        pairs = looking[:, :, None] & moved[:, None, :]
        allowed[target.to(logits.device), call.image, old:] = pairs
        return logits.masked_fill(~allowed[:, None], -torch.inf)


class Refinement(_Corresponding):
    """The output at a destination is blended with that at its origin.

    Args:
        maps: (target branch, image) -> its map.
        sites: names of the layers to control.
        most: weight h in the first steps.
        hold: fraction of the steps with that weight.
        until: fraction of the steps after which it is 0; between, half a cosine.
        reference: the branch that is read.
    """

    def __init__(
        self,
        maps: Mapping[Key, DragMap],
        sites: frozenset[str],
        most: float,
        hold: float,
        until: float,
        reference: str = "source",
    ):
        super().__init__(maps, sites, reference)
        self.most, self.hold, self.until = most, hold, until

    def active(self, call: AttentionCall) -> bool:
        """While the weight is above 0."""
        return super().active(call) and self.weight(call.step) > 0

    def weight(self, step: Step | None) -> float:
        """h of a step."""
        part = done(step)
        if part >= self.until:
            return 0.0
        if part < self.hold:
            return self.most
        return (
            self.most * (1 + math.cos(math.pi * (part - self.hold) / (self.until - self.hold))) / 2
        )

    def output(self, call: AttentionCall, out: Tensor) -> Tensor:
        """Blend."""
        keys, target, origin = self.rows(call)
        share = self.weight(call.step) * self.stacked("weight", keys, out)
        share = share[:, None, :, None].to(out.dtype)
        rows, sources = target.to(out.device), origin.to(out.device)
        image = out[..., call.image, :]
        taken = _at(image[sources], self.stacked("source", keys, out))
        return _with_image(call, out, rows, (1 - share) * image[rows] + share * taken)


def done(step: Step | None) -> float:
    """Part of the steps that lie behind."""
    assert step is not None
    return step.passed


def _with_image(call: AttentionCall, x: Tensor, rows: Tensor, image: Tensor) -> Tensor:
    """Return `x` with the image tokens of some rows replaced; out of place."""
    own = torch.slice_scatter(x[rows], image, -2, call.image.start, call.image.stop)
    return x.index_copy(0, rows, own)


def _at(x: Tensor, index: Tensor) -> Tensor:
    """Tokens (R, heads, N, d) at places (R, N)."""
    return x.gather(-2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))


def turned(x: Tensor, rotary: Rotary, *, back: bool = False) -> Tensor:
    """Rotate pairs of neighbouring features (..., N, d) by the angles of `rotary`, (N, d) each."""
    cos, sin = rotary
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-imaginary, real], -1).flatten(-2)
    return x * cos - across * sin if back else x * cos + across * sin
