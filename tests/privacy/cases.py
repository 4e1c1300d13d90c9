"""Small attacks with an exact generator: coloured squares and a classifier of mean colours.

One Gaussian makes the way back affine with a scalar slope, so that skipping the denoiser in the
gradient is no approximation here.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

import retour
from problems import PATHS, Mixture, ProblemModel
from retour.privacy import Classifier
from retour.privacy.base import AttackJob

COLOURS = ("red", "green", "blue")
SIZE = 8


def model(path: str = "discrete", prediction: str = "eps") -> ProblemModel:
    """Draws noisy reddish squares, exactly."""
    mean = torch.tensor([0.3, 0.0, -0.3], dtype=torch.float64).reshape(1, 3, 1, 1)
    return ProblemModel(Mixture(("red",), (1.0,), mean, (0.4,)), PATHS[path], prediction)


class MeanColour(nn.Module):
    """Logits are the channels' means; `gain` sets how far apart, `bias` who wins."""

    def __init__(self, gain: float = 10.0, bias: tuple[float, float, float] = (0.0, 0.0, 0.0)):
        super().__init__()
        self.weight = nn.Parameter(gain * torch.eye(3))
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) @ self.weight + self.bias


def classifier(**options: object) -> Classifier:
    """The classifier of mean colours."""
    return Classifier(MeanColour(**options), "colours", COLOURS)


def square(red: float = 0.6, green: float = 0.5, blue: float = 0.3, seed: int = 0) -> np.ndarray:
    """A noisy square (8, 8, 3) in [0, 1] of about that colour."""
    noise = 0.05 * np.random.default_rng(seed).standard_normal((SIZE, SIZE, 3))
    return np.clip(np.array([red, green, blue]) + noise, 0, 1)


def squares(count: int) -> list[np.ndarray]:
    """Red squares, the later the nearer to green."""
    return [square(green=0.5 + 0.095 * k / max(count - 1, 1), seed=k) for k in range(count)]


def job(
    images: list[np.ndarray],
    judge: Classifier | None = None,
    *,
    method: str = "edict",
    steps: int = 5,
    guidance: float = 3.0,
    prompt: str = "red",
    net: ProblemModel | None = None,
    **options: object,
) -> AttackJob:
    """Inverted squares that should be called red."""
    chosen = model() if net is None else net
    inversion = retour.invert(
        chosen, images, prompt, method=method, steps=steps, guidance=guidance, **options
    )
    pixels = torch.stack([retour.io.to_tensor(retour.io.read_image(i)) for i in images]) / 2 + 0.5
    labels = torch.zeros(len(images), dtype=torch.long)
    return AttackJob(inversion, classifier() if judge is None else judge, labels, pixels)
