"""Stable Diffusion 3 and 3.5: an MM-DiT that predicts the velocity of the linear flow.

Path times are s in [0, 1]; the network is told `s * num_train_timesteps`, in float32 (bfloat16 has
no 999.5). The text sequence is CLIP's tokens, then T5's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.grid import Grid, flow_grid
from ..core.model import AttentionSite, Condition, FeatureSite, Tokens
from ..core.path import FlowPath
from ..errors import RetourError
from .base import DiffusersModel, Family, default_of
from .features import transformer_features
from .modules import gradients
from .schedules import flow_shift
from .sites import attention_sites
from .text import TextTower, join_tokens

# For pipelines whose encode_prompt does not say how long T5's part is.
T5_TOKENS = 256


class DiffusersSD3(DiffusersModel):
    """Adapter of `StableDiffusion3Pipeline`.

    The condition holds `embeds` (B, L, D) and `pooled` (B, P). A missing second CLIP encoder leaves
    zeros in its features and a missing T5 zeros in its tokens, as in SD3's own training; the fact
    `t5_tokens` (a key of `retour.json`) says how long that part is, 0 for a model trained without
    it.
    """

    def __init__(self, pipe: Any, *, facts: Mapping[str, Any] | None = None, **options: Any):
        super().__init__(pipe, "transformer", facts=facts, **options)
        config = self.net.config
        self.path = FlowPath()
        self.prediction = "velocity"
        self.capabilities = frozenset(
            {"attention", "features", "flow", "gradients", "image", "joint-attention", "text"}
        )
        self.multiple = self.codec.factor * config.patch_size
        flow_shift(pipe.scheduler, 1)  # refuses a scheduler that knows no flow
        tokens = default_of(pipe, "max_sequence_length", T5_TOKENS, method="encode_prompt")
        self.t5_tokens = int((facts or {}).get("t5_tokens", tokens))
        self.clips, self.t5 = self._split_towers()

    def network(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Bare MM-DiT: latents (R, C, h, w) and flow times (R,) -> float64 velocity."""
        embeds, pooled = condition.tensors["embeds"], condition.tensors["pooled"]
        with gradients((x, embeds, pooled)):
            device, dtype = self.device, self.dtype
            out = self.run(
                hidden_states=x.to(device, dtype),
                timestep=(t * self.train_steps).to(device, torch.float32),
                encoder_hidden_states=embeds.to(device, dtype),
                pooled_projections=pooled.to(device, dtype),
                return_dict=False,
            )[0]
            return out.to(x.device).double()

    def grid(self, steps: int, *, size: tuple[int, int] | None = None) -> Grid:
        """Uniform flow times, shifted once by the scheduler's factor for that size.

        The pipeline walks the same when given `sigmas = linspace(1, 1/N, N)`. Without them
        diffusers shifts twice and ends in a tiny step.
        """
        height, width = (self.native, self.native) if size is None else size
        tokens = (height // self.multiple) * (width // self.multiple)
        return flow_grid(steps, flow_shift(self.pipe.scheduler, tokens))

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents; sides beyond the table of positions are refused."""
        shape = super().latent_shape(height, width)
        side = self.net.config.pos_embed_max_size * self.multiple
        if max(height, width) > side:
            raise RetourError(
                f"{self.name!r} takes sides up to {side}, got {width} x {height}: shrink the image"
            )
        return shape

    def attention_sites(self) -> list[AttentionSite]:
        """Attention layers by block: `joint`, then (dual-attention blocks) `self`."""
        blocks = self.net.transformer_blocks
        return attention_sites([("block", "transformer_blocks", blocks)])

    def feature_sites(self) -> list[FeatureSite]:
        """Attention layers and blocks."""
        blocks = self.net.transformer_blocks
        return transformer_features([("transformer_blocks", blocks)], self.net.config.patch_size)

    def tokens(self, prompt: str) -> Tokens:
        """Tokenise one prompt; positions count along CLIP's tokens, then T5's.

        `ids` has no entries for the zeros of a missing T5.
        """
        sequence = [self.clips[0]] + ([] if self.t5 is None else [self.t5])
        return join_tokens([tower.tokens(prompt) for tower in sequence])

    def _split_towers(self) -> tuple[tuple[TextTower, ...], TextTower | None]:
        if getattr(self.pipe, "text_encoder", None) is None:
            raise RetourError(
                f"{self.name!r} lacks its first text encoder: load the pipeline with it"
            )
        third = getattr(self.pipe, "text_encoder_3", None)
        clips = tuple(tower for tower in self.towers if tower.encoder is not third)
        if third is None or self.t5_tokens == 0:
            return clips, None
        long = self.towers[-1]
        return clips, TextTower(long.tokenizer, long.encoder, self.t5_tokens, long.convert)

    def _encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        config = self.net.config
        parts = [tower.hidden(prompts, penultimate=True) for tower in self.clips]
        clip = torch.cat([hidden for hidden, _ in parts], dim=-1)
        clip = pad(clip, (0, config.joint_attention_dim - clip.shape[-1]))
        pooled = torch.cat([vector for _, vector in parts if vector is not None], dim=-1)
        pooled = pad(pooled, (0, config.pooled_projection_dim - pooled.shape[-1]))
        return {
            "embeds": torch.cat([clip, self._long_text(prompts, clip)], dim=-2),
            "pooled": pooled,
        }

    def _long_text(self, prompts: Sequence[str], clip: Tensor) -> Tensor:
        if self.t5 is None:
            return clip.new_zeros(len(prompts), self.t5_tokens, clip.shape[-1])
        return self.t5.hidden(prompts, penultimate=False)[0].to(clip.device)

    def _facts(self) -> dict[str, Any]:
        return super()._facts() | {"t5_tokens": self.t5_tokens}


FAMILY = Family(
    adapter=DiffusersSD3,
    pipelines=("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
    half="bfloat16",
)
