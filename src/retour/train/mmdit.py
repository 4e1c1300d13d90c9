"""Train the denoiser of emoji-mmdit: an SD3Transformer2DModel on a rectified flow.

    python -m retour.train.mmdit --pool POOL --vae RUN/vae --clip RUN/clip --out RUN --minutes 90

x_s = (1 - s) x0 + s eps, target eps - x0, s logit-normal, leaning towards noise. The conditioning
is what StableDiffusion3Pipeline makes of one CLIP used twice and no T5: the next-to-last hidden
states side by side, followed by rows of zeros in place of T5. The pipeline adds 256 such rows
unless told otherwise (`max_sequence_length=1` is much faster), so some batches have them, most have
0 or 1.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from retour.train.generator import Easel, command_line, guided
from retour.train.latents import Pool
from retour.train.loop import Trainer, options_from

TIMES = 1000
CENTRE, SPREAD = 0.5, 1.2
T5_ROWS = 256
T5_EVERY = 16


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Straight paths, unshifted times."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMES, shift=1.0)


def make_mmdit(
    width: int = 192, layers: int = 5, text_width: int = 160, pooled: int = 128
) -> SD3Transformer2DModel:
    """A joint-attention transformer of 6.5 M parameters for latents 4 x 16 x 16 in patches of 2."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=2 * text_width,
        caption_projection_dim=width,
        pooled_projection_dim=2 * pooled,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


@torch.no_grad()
def embed(text: CLIPTextModelWithProjection, ids: Tensor, t5_rows: int) -> tuple[Tensor, Tensor]:
    """Words (B, 32 + t5_rows, 2 D) and pooled vector (B, 2 P) of token rows, as the pipeline's."""
    out = text(ids, output_hidden_states=True)
    words = torch.cat([out.hidden_states[-2]] * 2, dim=-1)
    return F.pad(words, (0, 0, 0, t5_rows)), torch.cat([out.text_embeds] * 2, dim=-1)


class MmditTask:
    """Predict the velocity of pooled latents."""

    part = "transformer"

    def __init__(
        self,
        pool: Pool,
        text: CLIPTextModelWithProjection,
        easel: Easel,
        batch: int,
        dropout: float,
        model: SD3Transformer2DModel,
    ) -> None:
        self.pool, self.easel, self.model = pool, easel, model
        self.text = text.eval().requires_grad_(False)
        self.batch, self.dropout = batch, dropout

    def loss(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Squared error of the velocity."""
        x, ids = self.pool.batch(self.batch, self.dropout, generator)
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        logits = CENTRE + SPREAD * torch.randn(len(x), generator=generator)
        s = torch.sigmoid(logits).to(x.device)
        share = s.view(-1, 1, 1, 1)
        words, pooled = embed(self.text, ids, step % 2 if step % T5_EVERY else T5_ROWS)
        velocity = self.model(
            (1 - share) * x + share * noise, words, pooled, s * TIMES
        ).sample.float()
        return {"loss": (velocity - (noise - x)).square().mean()}

    @torch.no_grad()
    def sample(self, model: SD3Transformer2DModel, steps: int = 20, scale: float = 4.0) -> Tensor:
        """Euler samples (B, 4, 16, 16) for the easel's prompts."""
        words, pooled = embed(self.text, self.easel.ids, 0)
        x = self.easel.noise
        times = torch.linspace(1.0, 0.0, steps + 1, device=x.device)
        for s, s_next in zip(times[:-1], times[1:], strict=True):
            rows = (s * TIMES).expand(len(x))
            velocity = guided(
                lambda x, t: model(x, words, pooled, t).sample.float(), x, rows, scale
            )
            x = x + (s_next - s) * velocity
        return x

    def picture(self, model: SD3Transformer2DModel) -> Image.Image:
        """Samples for the easel's prompts."""
        return self.easel.show(self.sample(model))

    def publish(self, model: SD3Transformer2DModel, folder: Path) -> None:
        """Write the averaged model."""
        model.save_pretrained(folder)


def main() -> None:
    """Train from the command line; the averaged model goes to RUN/transformer."""
    arguments = command_line(
        "mmdit", batch=32, lr=6e-4, ema=0.999, channels_last=False
    ).parse_args()
    options = options_from(arguments)
    device = options.device
    easel = Easel(
        AutoencoderKL.from_pretrained(arguments.vae).float().to(device),
        CLIPTokenizer.from_pretrained(arguments.clip),
        device,
    )
    text = CLIPTextModelWithProjection.from_pretrained(arguments.clip).float().to(device)
    pool = Pool.read(arguments.pool, device)
    Trainer(
        MmditTask(pool, text, easel, options.batch, arguments.dropout, make_mmdit()), options
    ).fit()


if __name__ == "__main__":
    main()
