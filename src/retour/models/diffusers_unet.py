"""Stable Diffusion 1.x, 2.x and XL: a UNet with cross-attention on the discrete VP path.

The network predicts eps, v or x0 (the scheduler's config says which) at integer training levels;
times between them are passed as they are, and the clean end t = -1 as level 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.grid import Grid
from ..core.model import AttentionSite, Condition, FeatureSite
from ..core.path import DiscreteVP
from ..errors import RetourError
from .base import DiffusersModel, Family
from .features import unet_features
from .modules import gradients
from .schedules import prediction_kind, vp_grid, vp_path
from .sites import attention_sites


class DiffusersUNet(DiffusersModel):
    """Adapter of `StableDiffusionPipeline` and `StableDiffusionXLPipeline`.

    The condition holds `embeds` (B, L, D), and for SDXL `pooled` (B, P) and `time_ids` (B, 6):
    original height and width, crop (0, 0), target height and width.

    SDXL's empty prompt: the pipeline gives zeros to a *missing* negative prompt if its config says
    `force_zeros_for_empty_prompt`, and encodes an explicit "". Here both are "", and the config
    decides: zeros if it says so, which is what the network was trained with.
    """

    path: DiscreteVP

    def __init__(self, pipe: Any, **options: Any):
        super().__init__(pipe, "unet", **options)
        config = self.net.config
        if getattr(config, "time_cond_proj_dim", None) is not None:
            raise RetourError(
                f"{self.name!r} takes its guidance scale as an input (LCM): load the base model"
            )
        if pipe.config.get("requires_aesthetics_score", False):
            raise RetourError(
                f"{self.name!r} is a refiner, which asks for aesthetic scores: load the base model"
            )
        self.xl = config.addition_embed_type == "text_time"
        self.prediction = prediction_kind(pipe.scheduler.config)
        self.path = vp_path(pipe.scheduler, self.prediction)
        self.capabilities = frozenset(
            {"attention", "cross-attention", "features", "gradients", "image", "text", "vp"}
        )
        halvings = sum(block.downsamplers is not None for block in self.net.down_blocks)
        self.multiple = self.codec.factor * 2**halvings
        self.zeros_for_empty = bool(pipe.config.get("force_zeros_for_empty_prompt", False))

    def network(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Bare UNet: latents (R, C, h, w) and levels (R,) -> float64 output, where `x` is."""
        given = condition.tensors
        with gradients((x, *given.values())):
            device, dtype = self.device, self.dtype
            added = None
            if self.xl:
                pooled, time_ids = given["pooled"].to(device, dtype), given["time_ids"].to(device)
                added = {"text_embeds": pooled, "time_ids": time_ids}
            # The UNet's time embedding reads float32: whole levels are exact in it.
            out = self.run(
                x.to(device, dtype),
                t.clamp(min=0).to(device, torch.float32),
                encoder_hidden_states=given["embeds"].to(device, dtype),
                added_cond_kwargs=added,
                return_dict=False,
            )[0]
            return out.to(x.device).double()

    def grid(self, steps: int, *, size: tuple[int, int] | None = None) -> Grid:
        """The pipeline's own DDIM grid: its scheduler's spacing, offset and last level."""
        return vp_grid(self.pipe.scheduler.config, steps, self.train_steps)

    def attention_sites(self) -> list[AttentionSite]:
        """Attention layers down, mid, up; per transformer block `self`, then `cross`."""
        net = self.net
        parts = [("down", "down_blocks", net.down_blocks), ("mid", "mid_block", net.mid_block)]
        parts.append(("up", "up_blocks", net.up_blocks))
        return attention_sites(part for part in parts if part[2] is not None)

    def feature_sites(self) -> list[FeatureSite]:
        """ResNet blocks, their last convolutions, attention layers and blocks: down, mid, up."""
        return unet_features(self.net)

    def _encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        if not self.xl:
            return {"embeds": self.towers[0].hidden(prompts, penultimate=False)[0]}
        hidden, pooled = zip(
            *[t.hidden(prompts, penultimate=True) for t in self.towers], strict=True
        )
        dtype = self.towers[-1].encoder.dtype
        embeds = torch.cat(hidden, dim=-1).to(dtype)
        tensors = {"embeds": embeds, "pooled": next(p for p in pooled if p is not None)}
        empty = torch.tensor([self.zeros_for_empty and p == "" for p in prompts])
        for value in tensors.values():
            value[empty.to(value.device)] = 0
        return tensors

    def _size_tensors(self, count: int, height: int, width: int) -> dict[str, Tensor]:
        if not self.xl:
            return {}
        ids = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
        return {"time_ids": ids.to(self.device).repeat(count, 1)}

    def _facts(self) -> dict[str, Any]:
        table = hashlib.sha256(self.path.abar.numpy().data).hexdigest()
        return super()._facts() | {"levels": table, "zeros_for_empty": self.zeros_for_empty}


FAMILY = Family(
    adapter=DiffusersUNet,
    pipelines=(
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
    ),
    half="float16",
)
