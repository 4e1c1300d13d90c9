r"""Unified Attention Control (InfEdit): source, target, and a layout branch between them.

The *layout* branch of a target is asked with the source's prompt at latents of its own. In every
self-attention, with r the part of the steps begun so far, in (0, 1]:

* :math:`r < r_{self}`: all branches look as the source does (its Q and K); the target moves its own
  values, the layout the source's;
* later: source and target attend by themselves; the layout asks with the target's Q and is answered
  with the source's K and V, so that it shows the source's content in the target's pose.

In cross-attention, while :math:`r \le r_{cross}`, a target token that has a counterpart in the
source prompt is given the layout's map of it; new tokens keep the target's own:

.. math:: M_{tgt,j} \leftarrow M_{lay, A(j)} \quad\text{where } A(j) \text{ exists}

Self-attention acts in both halves of guidance (a source that is not guided lends its one row),
cross-attention in the conditional half. In joint attention "self" is the image's part of Q, K and
V, "cross" the block of image queries and text keys.

Alignment: equal tokens in order (:func:`retour.editors.align.refine`); then, in every gap that both
prompts leave between two such tokens, the two of largest cosine in the text encoder's output.

Reference: Xu et al., "Inversion-Free Image Editing with Language-Guided Diffusion Models", CVPR
2024, arXiv 2312.04965.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.control import AttentionCall, AttentionControl
from ..core.branches import Rows
from ..core.grid import Step
from ..core.model import AttentionSite, Tokens
from ._inject import borrowed, lenders
from .align import Alignment, refine


def begun(step: Step) -> float:
    """Part of the steps that have begun, in (0, 1]."""
    return (step.position + 1) / step.count


def similar(source: Tokens, target: Tokens, old: Tensor, new: Tensor) -> Alignment:
    """Align equal tokens, and the most similar two of each gap between them.

    Args:
        source: the source prompt's tokens.
        target: the target prompt's.
        old: the text encoder's output for the source, (L, D).
        new: its output for the target, (L, D).
    """
    exact = refine(source, target)
    matrix, kept = exact.matrix.clone(), exact.kept.clone()
    pairs = [(int(exact.matrix[:, j].argmax()), j) for j in range(len(kept)) if kept[j]]
    ends = [(-1, -1), *pairs, (len(source.ids), len(target.ids))]
    cosine = F.normalize(old.float(), dim=-1) @ F.normalize(new.float(), dim=-1).T
    for (i, j), (i_next, j_next) in zip(ends, ends[1:], strict=False):
        gap = cosine[i + 1 : i_next, j + 1 : j_next]
        if gap.numel():
            best = int(gap.argmax())
            row, column = i + 1 + best // gap.shape[1], j + 1 + best % gap.shape[1]
            matrix[row, column] = kept[column] = 1
    return Alignment(matrix, kept)


class SelfControl(AttentionControl):
    """The self-attention rule.

    Args:
        layouts: target branch -> its layout branch.
        until: :math:`r_{self}`.
    """

    def __init__(self, layouts: Mapping[str, str], until: float):
        self.targets = {layout: target for target, layout in layouts.items()}
        self.until = until

    def wants(self, site: AttentionSite) -> bool:
        """Layers in which the image looks at itself."""
        return site.kind != "cross"

    def active(self, call: AttentionCall) -> bool:
        """On the way down."""
        return call.step is not None and call.step.down

    def qkv(
        self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Lend the source's rows."""
        source = lenders(call.rows)
        if source is None or call.step is None:
            return q, k, v
        own, layout = torch.arange(len(q)), self._is_layout(call.rows)
        if begun(call.step) < self.until:
            q, k = (borrowed(part, source, call.image) for part in (q, k))
        else:
            q = borrowed(q, torch.where(layout, self._askers(call.rows), own), call.image)
            k = borrowed(k, torch.where(layout, source, own), call.image)
        return q, k, borrowed(v, torch.where(layout, source, own), call.image)

    def _is_layout(self, rows: Rows) -> Tensor:
        return torch.tensor([row.branch in self.targets for row in rows])

    def _askers(self, rows: Rows) -> Tensor:
        """For each row of a layout its target's row of the same half and image."""
        place = {(row.branch, row.half, row.image): i for i, row in enumerate(rows)}
        return torch.tensor(
            [
                place.get((self.targets.get(row.branch, row.branch), row.half, row.image), i)
                for i, row in enumerate(rows)
            ]
        )


class CrossControl(AttentionControl):
    """The cross-attention rule.

    Args:
        alignments: (target branch, image) -> how its tokens inherit.
        lenders: target branch -> the branch whose maps its aligned tokens get.
        until: :math:`r_{cross}`.
    """

    def __init__(
        self,
        alignments: Mapping[tuple[str, int], Alignment],
        lenders: Mapping[str, str],
        until: float,
    ):
        self.alignments, self.lenders, self.until = alignments, lenders, until

    def wants(self, site: AttentionSite) -> bool:
        """Layers in which the image looks at the text."""
        return site.kind in ("cross", "joint")

    def active(self, call: AttentionCall) -> bool:
        """On the way down, in the first part of the steps."""
        step = call.step
        return step is not None and step.down and begun(step) <= self.until

    def probs(self, call: AttentionCall, probs: Tensor) -> Tensor:
        """Give aligned tokens of the targets the layout's maps."""
        assert call.text is not None
        place = call.rows.conditional()
        maps = call.image_to_text(probs)
        rows, given = [], []
        for (branch, image), alignment in self.alignments.items():
            target = place.get((branch, image))
            lender = place.get((self.lenders[branch], image))
            if target is None or lender is None:
                continue
            matrix, kept = (_fit(t, maps.shape[-1]).to(maps) for t in vars(alignment).values())
            rows.append(target)
            given.append(kept * (maps[lender] @ matrix) + (1 - kept) * maps[target])
        if not rows:
            return probs
        index = torch.tensor(rows, device=maps.device)
        return call.with_block(probs, maps.index_copy(0, index, torch.stack(given)), call.text)


def _fit(table: Tensor, size: int) -> Tensor:
    """Cut or zero-pad every axis to `size`: tokens beyond the table keep their own maps."""
    return F.pad(table, [n for length in reversed(table.shape) for n in (0, size - length)])
