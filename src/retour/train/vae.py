"""Train the AutoencoderKL: 64 x 64 x 3 to 16 x 16 x 4.

    python -m retour.train.vae --data SPRITES --out RUN --minutes 25

The loss is L1 + 2 MSE + 0.5 L1 of the image gradients, in pixels of -1..1, plus a tiny KL that only
keeps the latents bounded. Half of the images get varied backgrounds, tints and textures, so that
that the model also holds outside the palette.

    python -m retour.train.vae --data SPRITES --out RUN2 --start RUN/vae --decoder-only --minutes 60

trains the decoder further on the encoder's modes (what inversion and sampling give it): the latents
stay as they are, and so do the generators made for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from retour.data.scenes import Mix, Sampler, Scene, Studio, make_split
from retour.data.sprites import SIZE, load
from retour.train.loop import Trainer, add_data, grid, options_from, parser

KL_WEIGHT = 2e-5
MIX = Mix(centred=0.45, large=0.25, small=0.03, corner=0.07, two=0.2, recoloured=0.3, jitter=0.05)


def make_vae(widths: tuple[int, ...] = (24, 48, 96)) -> AutoencoderKL:
    """A narrow autoencoder, 4 pixels to one latent position for three widths."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        force_upcast=False,
        shift_factor=0.0,
    )


def to_tensor(images: Sequence[np.ndarray]) -> Tensor:
    """Images (H, W, 3) uint8 to one tensor (B, 3, H, W) in -1..1."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1.0


def texture(rng: np.random.Generator) -> np.ndarray:
    """A random background (64, 64, 3) in 0..1: a gradient, at times with soft noise."""
    start, stop = rng.random(3), rng.random(3)
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1) - 0.5
    ramp = np.clip(0.5 + x * np.cos(angle) + y * np.sin(angle), 0, 1)[..., None]
    image = start + (stop - start) * ramp
    if rng.random() < 0.4:
        cells = int(rng.choice([4, 8, 16]))
        coarse = rng.uniform(-0.25, 0.25, (cells, cells, 3))
        image = image + np.kron(coarse, np.ones((SIZE // cells, SIZE // cells, 1)))
    return np.clip(image, 0, 1).astype(np.float32)


def jitter(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random gain and offset per channel of an image (64, 64, 3) uint8."""
    gain, offset = rng.uniform(0.7, 1.2, 3), rng.uniform(-25, 25, 3)
    return np.clip(image * gain + offset, 0, 255).astype(np.uint8)


def augmented(studio: Studio, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The scene, in half of the cases on a random texture and tinted."""
    if rng.random() < 0.5:
        return studio.render(scene)
    image = studio.render(scene, texture(rng))
    return jitter(image, rng) if rng.random() < 0.5 else image


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical differences of images (B, C, H, W)."""
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_loss(x: Tensor, y: Tensor) -> Tensor:
    """L1 + 2 MSE + 0.5 L1 of gradients between images (B, 3, H, W)."""
    error = y - x
    edges = sum(part.abs().mean() for part in gradients(error))
    return error.abs().mean() + 2.0 * error.square().mean() + 0.5 * edges


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of images (B, 3, H, W) in -1..1, `y` clipped."""
    error = (y.clamp(-1, 1) - x).square().mean(dim=(1, 2, 3))
    return 10.0 * torch.log10(4.0 / error.clamp_min(1e-10))


class VaeTask:
    """Reconstruct training scenes."""

    part = "vae"

    def __init__(
        self,
        train: Sampler,
        check: Sampler,
        batch: int,
        device: str,
        model: AutoencoderKL,
        decoder_only: bool = False,
    ) -> None:
        self.train, self.batch, self.device, self.model = train, batch, device, model
        self.decoder_only = decoder_only
        if decoder_only:
            for part in (model.encoder, model.quant_conv):
                part.requires_grad_(False)
        self.shown = to_tensor([check.studio.render(check.scene(i)) for i in range(48)]).to(device)

    def images(self, step: int) -> Tensor:
        """Batch of a step, (B, 3, 64, 64) in -1..1."""
        numbers = range(step * self.batch, (step + 1) * self.batch)
        scenes = ((self.train.scene(n), self.train.rng(n, 3)) for n in numbers)
        images = to_tensor([augmented(self.train.studio, scene, rng) for scene, rng in scenes])
        return images.to(self.device, memory_format=torch.channels_last)

    def loss(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Reconstruction of a posterior sample, and the KL to the unit normal.

        The decoder alone learns to reconstruct the mode.
        """
        x = self.images(step)
        if self.decoder_only:
            with torch.no_grad():
                mode = self.model.encode(x).latent_dist.mode()
            y = self.model.decode(mode).sample.float()
            return {"loss": reconstruction_loss(x, y), "psnr": psnr(x, y.detach()).mean()}
        posterior = self.model.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
        y = self.model.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1.0 - posterior.logvar).mean()
        fit = reconstruction_loss(x, y)
        return {
            "loss": fit + KL_WEIGHT * kl,
            "fit": fit,
            "kl": kl,
            "psnr": psnr(x, y.detach()).mean(),
        }

    def picture(self, model: AutoencoderKL) -> Image.Image:
        """Held-out scenes over their reconstructions."""
        y = model.decode(model.encode(self.shown).latent_dist.mode()).sample
        rows = [
            part for pair in zip(self.shown.split(16), y.split(16), strict=True) for part in pair
        ]
        print(f"held-out PSNR {psnr(self.shown, y).mean():.2f} dB", flush=True)
        return grid(torch.cat(rows) / 2 + 0.5, 16)

    def publish(self, model: AutoencoderKL, folder: Path) -> None:
        """Write the averaged model; with an encoder of its own, its scale is set on scenes."""
        if not self.decoder_only:
            scenes = [self.train.studio.render(self.train.scene(n)) for n in range(256)]
            set_scale(model, to_tensor(scenes).to(self.device))
        model.save_pretrained(folder)


@torch.no_grad()
def set_scale(model: AutoencoderKL, images: Tensor) -> None:
    """Register the factor that scales the latents of images (B, 3, 64, 64) to unit deviation."""
    latents = model.encode(images).latent_dist.mode()
    model.register_to_config(scaling_factor=round(float(1.0 / latents.std()), 5))


def main() -> None:
    """Train from the command line; the averaged model goes to RUN/vae."""
    command = add_data(parser("vae", batch=16, lr=1.5e-3, ema=0.998))
    command.add_argument("--start", type=Path, help="model folder to start from")
    command.add_argument("--decoder-only", action="store_true", help="keep the latents")
    arguments = command.parse_args()
    if arguments.decoder_only and arguments.start is None:
        command.error("--decoder-only needs --start, the model whose latents stay")
    options = options_from(arguments)
    studio = Studio(load(arguments.data, arguments.concepts))
    split = make_split(studio.sprites)
    train = Sampler(studio, split, options.seed, "train", MIX)
    check = Sampler(studio, split, options.seed + 1, "concepts")
    start = arguments.start
    model = make_vae() if start is None else AutoencoderKL.from_pretrained(start)
    task = VaeTask(train, check, options.batch, options.device, model, arguments.decoder_only)
    Trainer(task, options).fit()


if __name__ == "__main__":
    main()
