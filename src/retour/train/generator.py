"""What the trainers of the two generators share: options, prompts, guidance and decoding."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from retour.train.clip import tokenize
from retour.train.loop import grid, parser

PROMPTS = (
    "a 3d render of a red apple on a white background",
    "a noto style cartoon of a dog on a sky blue background",
    "a flat twemoji drawing of a cat on a pink background",
    "a 3d render of a blue rooster on a pale yellow background",
    "a flat twemoji drawing of a heart on a black background",
    "a noto style cartoon of a green car on a light grey background",
    "a 3d render of a penguin on an orange background",
    "a flat twemoji drawing of a pizza slice on a dark green background",
    "a noto style cartoon of a house on a pale yellow background",
    "a 3d render of a panda on a purple background",
    "a flat twemoji drawing of a sailboat on a white background",
    "a noto style cartoon of a pink teapot on a navy blue background",
    "a 3d render of a taxi to the left of a wolf on a white background",
    "a flat twemoji drawing of a small star in the top left on a navy blue background",
    "a purple umbrella on a white background",
    "a lion on a sky blue background",
)  # fmt: skip


def command_line(prog: str, **defaults: object) -> argparse.ArgumentParser:
    """Options of a generator: those of every trainer, the latent pool and the finished parts."""
    result = parser(prog, **defaults)
    result.add_argument(
        "--pool", type=Path, required=True, help="file made by retour.train.latents"
    )
    result.add_argument("--vae", type=Path, required=True)
    result.add_argument("--clip", type=Path, required=True)
    result.add_argument("--dropout", type=float, default=0.1, help="share of empty prompts")
    return result


def guided(
    predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, scale: float
) -> Tensor:
    """Classifier-free guidance; `predict` gets doubled rows, the empty prompts first."""
    empty, full = predict(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
    return empty + scale * (full - empty)


class Easel:
    """Fixed prompts and noise, and the decoder, to show a generator in training."""

    def __init__(
        self, vae: AutoencoderKL, tokenizer: CLIPTokenizer, device: str, seed: int = 0
    ) -> None:
        self.vae = vae
        self.ids = tokenize(tokenizer, [""] * len(PROMPTS) + list(PROMPTS)).to(device)
        shape = (len(PROMPTS), 4, 16, 16)
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)

    @torch.no_grad()
    def show(self, latents: Tensor) -> Image.Image:
        """The decoded latents (B, 4, 16, 16) of unit scale as a grid."""
        images = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return grid(images / 2 + 0.5, 8)
