"""Train the denoiser of emoji-unet: a UNet2DConditionModel on the VP path of Stable Diffusion.

    python -m retour.train.unet --pool POOL --vae RUN/vae --clip RUN/clip --out RUN --minutes 90

It predicts the velocity v = alpha eps - sigma x0 (as Stable Diffusion 2 does); the error at time t
weighs min(1, 5 / SNR). A predicted noise must have a mean exact to a per cent where the signal is
weak, or the background gets a wrong colour, and networks this small take very long to learn that.
Times lean towards noise (the power 0.7 of uniform ones), where only the caption tells what to draw.
Cross-attention sits at 16 x 16, 8 x 8 and in the middle.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from retour.train.generator import Easel, command_line, guided
from retour.train.latents import Pool
from retour.train.loop import Trainer, options_from

TIMES = 1000
SNR_LIMIT = 5.0
SKEW = 0.7


def make_scheduler() -> DDIMScheduler:
    """The VP path of the model: scaled-linear betas, velocity prediction."""
    return DDIMScheduler(
        num_train_timesteps=TIMES,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def make_unet(
    widths: tuple[int, ...] = (64, 128, 192), text_width: int = 160
) -> UNet2DConditionModel:
    """A narrow UNet of 8.8 M parameters for latents 4 x 16 x 16."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=tuple(width // 32 for width in widths),
        norm_num_groups=16,
    )


def error_weights(alphas: Tensor) -> Tensor:
    """Weights (T,) of the velocity error for cumulative alphas (T,)."""
    return (SNR_LIMIT * (1.0 - alphas) / alphas).clamp(max=1.0)


class UnetTask:
    """Predict the velocity of pooled latents."""

    part = "unet"

    def __init__(
        self,
        pool: Pool,
        text: CLIPTextModel,
        easel: Easel,
        batch: int,
        dropout: float,
        model: UNet2DConditionModel,
    ) -> None:
        self.pool, self.easel, self.model = pool, easel, model
        self.text = text.eval().requires_grad_(False)
        self.batch, self.dropout = batch, dropout
        self.scheduler = make_scheduler()
        self.weights = error_weights(self.scheduler.alphas_cumprod)

    def loss(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Weighted squared error of the velocity."""
        x, ids = self.pool.batch(self.batch, self.dropout, generator)
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        t = (torch.rand(len(x), generator=generator) ** SKEW * TIMES).long()
        weights, t = self.weights[t].to(x.device), t.to(x.device)
        with torch.no_grad():
            words = self.text(ids).last_hidden_state
        predicted = self.model(self.scheduler.add_noise(x, noise, t), t, words).sample.float()
        velocity = self.scheduler.get_velocity(x, noise, t)
        error = (predicted - velocity).square().mean(dim=(1, 2, 3))
        return {"loss": (weights * error).mean(), "mse": error.mean()}

    @torch.no_grad()
    def sample(self, model: UNet2DConditionModel, steps: int = 25, scale: float = 4.0) -> Tensor:
        """DDIM samples (B, 4, 16, 16) for the easel's prompts."""
        scheduler = make_scheduler()
        scheduler.set_timesteps(steps)
        words = self.text(self.easel.ids).last_hidden_state
        x = self.easel.noise
        for t in scheduler.timesteps:
            times = t.expand(len(x)).to(x.device)
            velocity = guided(lambda rows, t: model(rows, t, words).sample.float(), x, times, scale)
            x = scheduler.step(velocity, t, x).prev_sample
        return x

    def picture(self, model: UNet2DConditionModel) -> Image.Image:
        """Samples for the easel's prompts."""
        return self.easel.show(self.sample(model))

    def publish(self, model: UNet2DConditionModel, folder: Path) -> None:
        """Write the averaged model."""
        model.save_pretrained(folder)


def main() -> None:
    """Train from the command line; the averaged model goes to RUN/unet."""
    arguments = command_line("unet", batch=32, lr=6e-4, ema=0.999).parse_args()
    options = options_from(arguments)
    device = options.device
    easel = Easel(
        AutoencoderKL.from_pretrained(arguments.vae).float().to(device),
        CLIPTokenizer.from_pretrained(arguments.clip),
        device,
    )
    text = CLIPTextModel.from_pretrained(arguments.clip).float().to(device)
    task = UnetTask(
        Pool.read(arguments.pool, device),
        text,
        easel,
        options.batch,
        arguments.dropout,
        make_unet(),
    )
    Trainer(task, options).fit()


if __name__ == "__main__":
    main()
