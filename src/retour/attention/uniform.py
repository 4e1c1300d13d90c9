r"""Uniform attention maps: every pixel looks at all text tokens alike.

In cross-attention the map :math:`S_{ij} = 1/L` over all L tokens, padding included, makes the
output the mean of the values, :math:`\tfrac1L\sum_j V_j`, the same vector at every pixel whatever
the queries and keys; only the values' mean is left of the prompt. Queries set to zero give just
that: all scores are equal, and the fused kernel still runs. Self-attention is untouched.

Reference: Mo et al., "Uniform Attention Maps: Boosting Image Fidelity in Reconstruction and
Editing", WACV 2025, arXiv 2411.19652.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.model import AttentionSite
from .control import AttentionCall, AttentionControl


class UniformMaps(AttentionControl):
    """Uniform cross-attention in all rows of some branches; other rows attend as they do.

    Args:
        branches: names of the branches.
    """

    def __init__(self, *branches: str):
        self.names = frozenset(branches)

    def wants(self, site: AttentionSite) -> bool:
        """Cross-attention."""
        return site.kind == "cross"

    def active(self, call: AttentionCall) -> bool:
        """Where one of the branches takes part."""
        return any(row.branch in self.names for row in call.rows)

    def qkv(
        self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of those rows set to zero."""
        chosen = torch.tensor([row.branch in self.names for row in call.rows], device=q.device)
        return q.masked_fill(chosen[:, None, None, None], 0), k, v
