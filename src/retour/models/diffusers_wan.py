"""Wan: a transformer over clips that predicts the velocity of the linear flow.

Path times are s in [0, 1]; the network is told `s * num_train_timesteps`. Latents have an axis
more, (B, C, f, h, w): the first frame has a latent frame of its own and every four further ones
share one, so a clip has 4 k + 1 frames. The text is UMT5's, with zeros where it is padded.

Everything in retour that reads latents as they come works on clips: inverters, samplers, guidance,
masks (one for all frames) and the editors that need no attention. Attention controls are not
offered: they take the tokens of a layer for one picture.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.grid import Grid, flow_grid
from ..core.model import AttentionSite, Tokens
from ..core.path import FlowPath
from ..errors import RetourError
from .base import DiffusersModel, Family, default_of
from .modules import gradients
from .schedules import flow_shift
from .text import TextTower

# For pipelines whose call does not say.
TOKENS = 512
SIDES = (480, 832)


class DiffusersWan(DiffusersModel):
    """Adapter of `WanPipeline` (Wan 2.1, text to video).

    The condition holds `embeds` (B, L, D). The fact `text_tokens` (a key of `retour.json`) replaces
    the pipeline's own length of the text.

    Raises:
        RetourError: for the two-network and per-token-time variants of Wan 2.2.
    """

    def __init__(self, pipe: Any, *, facts: Mapping[str, Any] | None = None, **options: Any):
        _refuse_variants(pipe)
        super().__init__(pipe, "transformer", facts=facts, **options)
        self.path = FlowPath()
        self.prediction = "velocity"
        self.capabilities = frozenset({"flow", "gradients", "text", "video"})
        self.multiple = self.codec.factor * self.net.config.patch_size[-1]
        tower = self.towers[0]
        tokens = int(
            (facts or {}).get("text_tokens", default_of(pipe, "max_sequence_length", TOKENS))
        )
        self.text = TextTower(tower.tokenizer, tower.encoder, min(tokens, tower.limit), _clean)
        self.grid(1)  # refuses a scheduler that knows no flow

    def encode(self, images: Tensor) -> Tensor:
        """Clips (B, 3, F, H, W) in [-1, 1] -> float64 latents (B, C, f, h, w), posterior mode."""
        if images.ndim != 5 or images.shape[1] != 3:
            raise RetourError(f"clips must be (B, 3, F, H, W), got {tuple(images.shape)}")
        self.latent_shape(*images.shape[-2:])
        self.latent_frames(images.shape[2])
        return self.codec.encode(images)

    def latent_frames(self, frames: int) -> int:
        """Number of latent frames of a clip of so many frames, which must fit the codec."""
        step = self.codec.frames or 1
        if (frames - 1) % step:
            low = frames - (frames - 1) % step
            raise RetourError(
                f"{self.name!r} takes clips of 1, {step + 1}, {2 * step + 1}, ... frames, got "
                f"{frames}: use {low} or {low + step}"
            )
        return (frames - 1) // step + 1

    def network(self, x: Tensor, t: Tensor, condition: Any) -> Tensor:
        """Bare transformer: latents (R, C, f, h, w) and flow times (R,) -> float64 velocity."""
        embeds = condition.tensors["embeds"]
        with gradients((x, embeds)):
            device, dtype = self.device, self.dtype
            out = self.run(
                hidden_states=x.to(device, dtype),
                timestep=(t * self.train_steps).to(device, torch.float32),
                encoder_hidden_states=embeds.to(device, dtype),
                return_dict=False,
            )[0]
            return out.to(x.device).double()

    def grid(self, steps: int, *, size: tuple[int, int] | None = None) -> Grid:
        """Uniform flow times, shifted by the scheduler's factor."""
        return flow_grid(steps, flow_shift(self.pipe.scheduler, 0))

    def attention_sites(self) -> list[AttentionSite]:
        """None: see the module's docstring."""
        return []

    def tokens(self, prompt: str) -> Tokens:
        """Tokenise one prompt as UMT5 does."""
        return self.text.tokens(prompt)

    def _encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"embeds": self.text.hidden(prompts, penultimate=False, blank=True)[0]}

    def _sample_size(self) -> int:
        # The side of the square of the area that the pipeline draws by default.
        height, width = (
            default_of(self.pipe, k, s) for k, s in zip(("height", "width"), SIDES, strict=True)
        )
        return round((height * width) ** 0.5 / self.codec.factor)

    def _facts(self) -> dict[str, Any]:
        return super()._facts() | {"text_tokens": self.text.limit}


def _refuse_variants(pipe: Any) -> None:
    told = pipe.config
    if getattr(pipe, "transformer_2", None) is not None or told.get("boundary_ratio") is not None:
        raise RetourError(
            "this Wan pipeline has two networks, by noise level: load a Wan 2.1 model"
        )
    if told.get("expand_timesteps"):
        raise RetourError("this Wan pipeline tells each token a time: load a Wan 2.1 model")


def _clean(prompt: str) -> str:
    """As the pipeline cleans its prompts, but for the repair of broken Unicode."""
    return " ".join(html.unescape(html.unescape(prompt)).split())


FAMILY = Family(adapter=DiffusersWan, pipelines=("WanPipeline",), half="bfloat16")
