"""Train a small classifier of emoji scenes: which of the favourite concepts is shown?

    python -m retour.train.classifier --data SPRITES --out RUN --arch cnn --minutes 20

The classes are the concepts of `retour/data/favourites.txt`. Each image shows one of them, in any
style, size, place and colour. The classifier shall hold on what the generators make of a picture,
so half of the scenes lie on random textures and are tinted, some are blurred or went through JPEG,
and some through the VAE, with noise on their latents.

Not seen in training: one background for each concept ("compositions"), and the (concept, style)
pairs that the generators do not see either ("drawings"); accuracies on both are printed at the end.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn import functional as F

from retour.data.palette import BACKGROUNDS
from retour.data.scenes import (
    SPLIT_SEED,
    Mix,
    Sampler,
    Scene,
    Split,
    Studio,
    favourites,
    make_split,
)
from retour.data.sprites import SIZE, Sprites, load
from retour.privacy._nets import ARCHITECTURES
from retour.privacy.classifiers import write_classifier
from retour.train.loop import Trainer, add_data, options_from, parser
from retour.train.vae import augmented, to_tensor

MIX = Mix(centred=0.7, large=0.1, small=0.1, corner=0.1, two=0.0, recoloured=0.4, jitter=0.04)
PARTS = ("train", "compositions", "drawings")
WORN = 0.4
DECODED = 0.125
LATENT_NOISE = 0.3
SMOOTHING = 0.05


class Scenes:
    """Labelled scenes by number: `part` is "train", "compositions" or "drawings"."""

    def __init__(self, studio: Studio, split: Split, seed: int, part: str) -> None:
        if part not in PARTS:
            raise ValueError(f"part must be one of {PARTS}, not {part!r}")
        self.part, self.labels = part, tuple(studio.sprites.concepts)
        self.sampler = Sampler(studio, split, seed, "pairs" if part == "drawings" else "train", MIX)

    def kept_back(self, concept: str) -> str:
        """The background that training never puts behind a concept."""
        rng = np.random.default_rng([SPLIT_SEED, self.labels.index(concept)])
        return str(rng.choice(list(BACKGROUNDS)))

    def scene(self, number: int) -> Scene:
        """Scene `number`, of one object."""
        scene = self.sampler.scene(number)
        kept_back = self.kept_back(scene.items[0].concept)
        if self.part == "compositions":
            return replace(scene, background=kept_back)
        if scene.background != kept_back:
            return scene
        grounds = list(BACKGROUNDS)
        return replace(scene, background=grounds[grounds.index(kept_back) - 1])

    def label(self, number: int) -> int:
        """Class of scene `number`."""
        return self.labels.index(self.scene(number).items[0].concept)

    def image(self, number: int, *, worn: bool = False) -> np.ndarray:
        """The picture (64, 64, 3) uint8; `worn` varies ground and colours, blurs, compresses."""
        scene = self.scene(number)
        if not worn:
            return self.sampler.studio.render(scene)
        rng = self.sampler.rng(number, 3)
        return wear(augmented(self.sampler.studio, scene, rng), rng)


def wear(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """At times blurred, at times through JPEG: image (H, W, 3) uint8."""
    picture = Image.fromarray(image)
    if rng.random() < WORN:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.2)))
    if rng.random() < WORN:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=int(rng.integers(25, 95)))
        picture = Image.open(file)
    return np.asarray(picture)


@torch.no_grad()
def decoded(vae: AutoencoderKL, images: Tensor, noise: Tensor | None = None) -> Tensor:
    """Images (B, 3, 64, 64) in -1..1 after the autoencoder, `noise` added to unit latents."""
    latents = vae.encode(images).latent_dist.mode()
    if noise is not None:
        latents = latents + noise / vae.config.scaling_factor
    return vae.decode(latents).sample.clamp(-1, 1)


class ClassifierTask:
    """Tell concepts apart."""

    def __init__(
        self, scenes: Scenes, vae: AutoencoderKL, batch: int, arch: str, net: nn.Module
    ) -> None:
        self.scenes, self.vae, self.batch, self.model = scenes, vae, batch, net
        self.arch, self.part = arch, f"emoji-classifier-{arch}"

    def images(self, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images (B, 3, 64, 64) in -1..1, the first of them decoded, and labels (B,) of a step."""
        numbers = range(step * self.batch, (step + 1) * self.batch)
        images = to_tensor([self.scenes.image(n, worn=True) for n in numbers])
        labels = torch.tensor([self.scenes.label(n) for n in numbers])
        count = round(DECODED * self.batch)
        if count:
            latents = (count, self.vae.config.latent_channels, SIZE // 4, SIZE // 4)
            spread = LATENT_NOISE * torch.rand(count, 1, 1, 1, generator=generator)
            noise = spread * torch.randn(latents, generator=generator)
            images[:count] = decoded(self.vae, images[:count], noise)
        return images, labels

    def loss(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Smoothed cross-entropy and the accuracy of a batch."""
        images, labels = self.images(step, generator)
        device = next(self.model.parameters()).device
        logits, labels = self.model(images.to(device)), labels.to(device)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING)
        return {"loss": loss, "accuracy": (logits.argmax(1) == labels).float().mean()}

    def picture(self, model: nn.Module) -> None:
        """A classifier has no picture."""

    def publish(self, model: nn.Module, folder: Path) -> None:
        """Write the averaged model and its configuration."""
        write_classifier(model, config(self.arch, self.scenes.labels), folder)


def config(arch: str, labels: tuple[str, ...]) -> dict[str, Any]:
    """What `retour.privacy.load_classifier` needs to know; images are scaled to -1..1."""
    return {
        "name": f"emoji-{arch}",
        "architecture": arch,
        "arguments": {},
        "labels": list(labels),
        "size": SIZE,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "summary": f"which of {len(labels)} emoji concepts a 64 px scene shows",
    }


@torch.no_grad()
def accuracy(
    net: nn.Module, scenes: Scenes, count: int = 512, vae: AutoencoderKL | None = None
) -> float:
    """Share of the first `count` scenes told right, as they are or after the autoencoder."""
    hits = []
    for start in range(0, count, 64):
        numbers = range(start, min(start + 64, count))
        images = to_tensor([scenes.image(n) for n in numbers])
        images = images if vae is None else decoded(vae, images)
        labels = torch.tensor([scenes.label(n) for n in numbers])
        hits.append((net(images).argmax(1) == labels).float())
    return float(torch.cat(hits).mean())


def favoured(sprites: Sprites) -> Sprites:
    """The sprites of the favourite concepts."""
    kept = {key: image for key, image in sprites.images.items() if key[0] in favourites()}
    return Sprites(kept, {c: g for c, g in sprites.groups.items() if c in favourites()})


def main() -> None:
    """Train from the command line; the averaged model goes to RUN/emoji-classifier-ARCH."""
    command = add_data(parser("classifier", batch=64, lr=2e-3, ema=0.995))
    command.add_argument("--arch", choices=sorted(ARCHITECTURES), default="cnn")
    command.add_argument("--vae", type=Path, help="folder of the autoencoder; the embedded one")
    arguments = command.parse_args()
    options = options_from(arguments)
    sprites = load(arguments.data, arguments.concepts)
    split, studio = make_split(sprites), Studio(favoured(sprites))
    embedded = Path(__file__).parents[1] / "weights" / "vae"
    vae = AutoencoderKL.from_pretrained(arguments.vae or embedded).eval().requires_grad_(False)
    train = Scenes(studio, split, options.seed, "train")
    net = ARCHITECTURES[arguments.arch](len(train.labels))
    task = ClassifierTask(train, vae, options.batch, arguments.arch, net)
    net = Trainer(task, options).fit().cpu()
    for part in PARTS:
        check = Scenes(studio, split, options.seed + 1, part)
        plain, after = accuracy(net, check), accuracy(net, check, vae=vae)
        print(f"{part}: accuracy {plain:.3f}, after the VAE {after:.3f}", flush=True)


if __name__ == "__main__":
    main()
