r"""FLUX: a transformer of double and single blocks that predicts the velocity of the linear flow.

Path times are s in [0, 1], which is what the network is told (it multiplies by 1000 itself). Four
latent cells, 2 x 2, are packed to one token of 4 C channels; a token's position is (0, row,
column), a text token's (0, 0, 0). The text sequence is T5's; CLIP gives its pooled vector only.

FLUX.1-dev is guidance-distilled: the scale of a guidance that it was taught to imitate is an
*input*, the condition's tensor `guidance` (B,), and costs nothing. It is not the classifier-free
scale that `guidance` means everywhere else in retour, which runs a second row and is 1 here by
default. `embedded_guidance` is what :meth:`DiffusersFlux.embed` writes there; another condition
may say otherwise (:meth:`retour.core.model.Condition.told`). FLUX.1-schnell has no such input.

The grid is shifted by :math:`e^\mu`, with :math:`\mu` linear in the number of image tokens, so it
depends on the image's size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.grid import Grid, flow_grid
from ..core.model import AttentionSite, Condition, FeatureSite, Tokens
from ..core.path import FlowPath
from ..errors import RetourError
from .base import DiffusersModel, Family, default_of
from .features import transformer_features
from .modules import gradients
from .schedules import flow_shift
from .sites import attention_sites
from .text import TextTower

PATCH = 2

# For pipelines whose signatures do not say.
T5_TOKENS = 512
EMBEDDED_GUIDANCE = 3.5


class DiffusersFlux(DiffusersModel):
    """Adapter of `FluxPipeline`.

    The condition holds `embeds` (B, L, D), `pooled` (B, P) and, for a guidance-distilled model,
    `guidance` (B,). The facts `t5_tokens` and `embedded_guidance` (keys of `retour.json`) replace
    the pipeline's own defaults; schnell was trained with 256 tokens where its pipeline takes 512.

    Attributes:
        distilled: whether the network takes a guidance scale as an input.
        embedded_guidance: that scale; may be changed.
    """

    packed = PATCH
    guidance_argument = "true_cfg_scale"

    def __init__(self, pipe: Any, *, facts: Mapping[str, Any] | None = None, **options: Any):
        super().__init__(pipe, "transformer", facts=facts, **options)
        facts = {} if facts is None else facts
        self.path = FlowPath()
        self.prediction = "velocity"
        self.distilled = bool(self.net.config.guidance_embeds)
        scale = default_of(pipe, "guidance_scale", EMBEDDED_GUIDANCE)
        self.embedded_guidance = float(facts.get("embedded_guidance", scale))
        self.capabilities = frozenset(
            {"attention", "features", "flow", "gradients", "image", "joint-attention", "text"}
        )
        self.multiple = self.codec.factor * PATCH
        tokens = default_of(pipe, "max_sequence_length", T5_TOKENS, method="encode_prompt")
        self.clip, self.t5 = self._split_towers(int(facts.get("t5_tokens", tokens)))
        self.grid(1)  # refuses a scheduler that knows no flow

    def network(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Bare transformer: latents (R, C, h, w) and flow times (R,) -> float64 velocity."""
        given = condition.tensors
        embeds, pooled = given["embeds"], given["pooled"]
        height, width = x.shape[-2:]
        with gradients((x, embeds, pooled)):
            device, dtype = self.device, self.dtype
            clock = torch.promote_types(dtype, torch.float32)
            out = self.run(
                hidden_states=pack(x.to(device, dtype)),
                timestep=t.to(device, clock),
                guidance=given["guidance"].to(device, clock) if self.distilled else None,
                encoder_hidden_states=embeds.to(device, dtype),
                pooled_projections=pooled.to(device, dtype),
                img_ids=positions(height // PATCH, width // PATCH).to(device, dtype),
                txt_ids=torch.zeros(embeds.shape[1], 3, device=device, dtype=dtype),
                return_dict=False,
            )[0]
            return unpack(out, height, width).to(x.device).double()

    def grid(self, steps: int, *, size: tuple[int, int] | None = None) -> Grid:
        """Uniform flow times, shifted once by the scheduler's factor for that size."""
        height, width = (self.native, self.native) if size is None else size
        tokens = (height // self.multiple) * (width // self.multiple)
        return flow_grid(steps, flow_shift(self.pipe.scheduler, tokens))

    def attention_sites(self) -> list[AttentionSite]:
        """All attention layers, double blocks and then single ones: `joint`, text first."""
        names = ("transformer_blocks", "single_transformer_blocks")
        parts = [("block", name, getattr(self.net, name)) for name in names]
        return attention_sites(parts, lambda module: "joint")

    def feature_sites(self) -> list[FeatureSite]:
        """Blocks, double and then single ones, and the double ones' attention layers."""
        names = ("transformer_blocks", "single_transformer_blocks")
        return transformer_features([(name, getattr(self.net, name)) for name in names], PATCH)

    def tokens(self, prompt: str) -> Tokens:
        """Tokenise one prompt; positions count along T5's tokens.

        The `cut` is what at least one of T5 and CLIP does not read.
        """
        long = self.t5.tokens(prompt)
        return replace(long, cut=max(long.cut, self.clip.tokens(prompt).cut, key=len))

    def _encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        embeds, _ = self.t5.hidden(prompts, penultimate=False)
        return {"embeds": embeds, "pooled": self.clip.pooled(prompts)}

    def _size_tensors(self, count: int, height: int, width: int) -> dict[str, Tensor]:
        if not self.distilled:
            return {}
        scale = torch.full((count,), self.embedded_guidance, dtype=torch.float32)
        return {"guidance": scale.to(self.device)}

    def _sample_size(self) -> int:
        return int(self.pipe.default_sample_size)

    def _split_towers(self, limit: int) -> tuple[TextTower, TextTower]:
        if len(self.towers) != 2:
            raise RetourError(
                f"{self.name!r} lacks one of its two text encoders: load the pipeline with both"
            )
        clip, long = self.towers
        limit = min(limit, long.limit)
        return clip, TextTower(long.tokenizer, long.encoder, limit, long.convert)

    def _facts(self) -> dict[str, Any]:
        axes = list(self.net.config.axes_dims_rope)
        return super()._facts() | {"t5_tokens": self.t5.limit, "axes": axes}


def pack(latents: Tensor) -> Tensor:
    """Latents (R, C, h, w) -> tokens (R, h/2 w/2, 4 C), row by row."""
    rows, channels, height, width = latents.shape
    cells = latents.reshape(rows, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(rows, -1, channels * PATCH**2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of :func:`pack`, for latents of `height` x `width`."""
    cells = tokens.unflatten(1, (height // PATCH, width // PATCH))
    cells = cells.unflatten(3, (-1, PATCH, PATCH))
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def positions(height: int, width: int) -> Tensor:
    """Position ids (height width, 3) of image tokens: 0, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)


FAMILY = Family(
    adapter=DiffusersFlux,
    pipelines=("FluxPipeline", "FluxImg2ImgPipeline"),
    half="bfloat16",
)
