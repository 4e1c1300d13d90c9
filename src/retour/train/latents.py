"""Latents and token rows of many scenes, made once for the loops of the generators.

python -m retour.train.latents --data SPRITES --vae RUN/vae --clip RUN/clip --out POOL
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from retour.data.scenes import Mix, Sampler, Studio, make_split
from retour.data.sprites import load
from retour.train.clip import tokenize
from retour.train.loop import add_data, write_atomically
from retour.train.vae import to_tensor

MIX = Mix(0.88, 0.02, 0.01, 0.03, 0.06, recoloured=0.22, jitter=0.01)


@dataclass(frozen=True)
class Pool:
    """Unit latents (N, 4, 16, 16), token rows (N, 32) and the row (32,) of the empty prompt."""

    latents: Tensor
    ids: Tensor
    empty: Tensor

    @classmethod
    def read(cls, path: Path, device: str = "cpu") -> Pool:
        """The pool in a file."""
        return cls(**{name: tensor.to(device) for name, tensor in load_file(path).items()})

    def write(self, path: Path) -> None:
        """Put the pool in a file, atomically."""
        write_atomically(path, lambda name: save_file(vars(self).copy(), name))

    def batch(
        self, count: int, dropout: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Random latents (count, 4, 16, 16) and token rows (count, 32), some of them empty."""
        rows = torch.randint(len(self.ids), (count,), generator=generator)
        dropped = torch.rand(count, generator=generator) < dropout
        device = self.latents.device
        ids = self.ids[rows.to(device)].long()
        ids[dropped.to(device)] = self.empty.long()
        return self.latents[rows.to(device)].float(), ids


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Latents (B, 4, 16, 16), of unit scale, of images (B, 3, 64, 64) in -1..1."""
    return vae.encode(images).latent_dist.mode() * vae.config.scaling_factor


def build(
    sampler: Sampler, vae: AutoencoderKL, tokenizer: CLIPTokenizer, count: int, chunk: int = 64
) -> Pool:
    """Encode the first `count` scenes of a sampler."""
    device = vae.device
    latents, ids = [], []
    for start in range(0, count, chunk):
        numbers = range(start, min(start + chunk, count))
        images = to_tensor([sampler.studio.render(sampler.scene(n)) for n in numbers]).to(device)
        latents.append(encode(vae, images).half().cpu())
        ids.append(tokenize(tokenizer, [sampler.caption(n) for n in numbers]).short())
    return Pool(
        torch.cat(latents).contiguous(), torch.cat(ids), tokenize(tokenizer, [""])[0].short()
    )


def main() -> None:
    """Build a pool from the command line."""
    parser = argparse.ArgumentParser(prog="python -m retour.train.latents", description=__doc__)
    add_data(parser)
    for name in ("vae", "clip", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--count", type=int, default=32_000)
    parser.add_argument("--favoured", type=float, default=0.0, help="share of favourite concepts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    studio = Studio(load(options.data, options.concepts))
    mix = replace(MIX, favoured=options.favoured)
    sampler = Sampler(studio, make_split(studio.sprites), options.seed, "train", mix)
    vae = AutoencoderKL.from_pretrained(options.vae).eval().to(options.device)
    build(sampler, vae, CLIPTokenizer.from_pretrained(options.clip), options.count).write(
        options.out
    )


if __name__ == "__main__":
    main()
