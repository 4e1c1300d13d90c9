r"""The picture codec of a latent model: a VAE with the scaling that its network was trained on.

:math:`z = (\mu(\text{image}) - m)\, c / s`, where :math:`\mu` is the posterior's mode, never a
sample, and the shift :math:`m`, the scale :math:`c` and the spread :math:`s` come from the VAE's
config (`shift_factor` or `latents_mean`, `scaling_factor`, `latents_std`). The affine part is done
in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import RetourError
from .modules import execution_device, gradients


class Codec:
    """Images to scaled latents and back.

    Attributes:
        vae: a diffusers autoencoder.
        factor: pixels per latent cell, along each side.
        frames: frames of a clip per latent frame, after the first, which has one of its own; None
            for a codec of pictures.
        channels: latent channels C.
    """

    def __init__(self, vae: Any):
        config = vae.config
        self.vae = vae
        self.frames: int | None = getattr(config, "scale_factor_temporal", None)
        axes = 2 if self.frames is None else 3
        self.factor: int = (
            2 ** (len(config.block_out_channels) - 1)
            if self.frames is None
            else config.scale_factor_spatial
        )
        self.channels: int = config.latent_channels if self.frames is None else config.z_dim
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        whitened = mean is not None and std is not None
        shift = mean if whitened else getattr(config, "shift_factor", None)
        self.shift = _per_channel(0.0 if shift is None else shift, axes)
        scale = getattr(config, "scaling_factor", 1.0)
        self.scale = scale / _per_channel(std if whitened else 1.0, axes)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> float64 latents (B, C, H/f, W/f), on its device.

        Clips (B, 3, F, H, W) become (B, C, f, h, w), where the codec is one of clips.
        """
        with gradients([images]), self._precise():
            out = self.vae.encode(images.to(execution_device(self.vae), self.vae.dtype))
            raw = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents
        raw = raw.to(images.device).double()
        return (raw - self.shift.to(raw.device)) * self.scale.to(raw.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Inverse of :meth:`encode`: float32, about [-1, 1]."""
        with gradients([latents]), self._precise():
            z = latents.double()
            raw = z / self.scale.to(z.device) + self.shift.to(z.device)
            raw = raw.to(execution_device(self.vae), self.vae.dtype)
            images = self.vae.decode(raw, return_dict=False)[0]
        return images.to(latents.device).float()

    @contextmanager
    def _precise(self) -> Iterator[None]:
        # SDXL's VAE overflows in float16 and says so in its config. Widening a user's own VAE for
        # the call and narrowing it again gives back the very same bits.
        if self.vae.dtype != torch.float16 or not getattr(self.vae.config, "force_upcast", False):
            yield
            return
        if torch.is_grad_enabled():
            raise RetourError(
                "this float16 VAE must run in float32 (force_upcast), and gradients need it to "
                "stay there: call vae.to(torch.float32) first"
            )
        self.vae.to(torch.float32)
        try:
            yield
        finally:
            self.vae.to(torch.float16)


def _per_channel(value: Any, axes: int) -> Tensor:
    tensor = torch.as_tensor(value, dtype=torch.float64)
    return tensor.reshape(-1, *[1] * axes) if tensor.ndim else tensor
