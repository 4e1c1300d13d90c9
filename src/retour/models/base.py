"""What all adapters of diffusers pipelines share: pictures, prompts, words, fingerprint.

An adapter reads a pipeline and never writes to it: its scheduler is only asked for its config, its
modules keep their type, mode, device and attention processors.
"""

from __future__ import annotations

import inspect
import logging
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.grid import Grid
from ..core.model import AttentionSite, Condition, FeatureSite, Tokens
from ..core.path import Path
from ..errors import RetourError, quote
from .codec import Codec
from .fingerprint import fingerprint, weight_version
from .modules import execution_device
from .text import TextTower, text_limit

logger = logging.getLogger(__name__)

PROMPTS_KEPT = 64
TOWERS = ("", "_2", "_3")

# Others (float8) are only stored in, and cast for computing.
NATIVE_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# For pipelines whose call does not say.
STEPS = 50
GUIDANCE = 7.5


@dataclass(frozen=True)
class Family:
    """How `load` knows an adapter and its pipelines.

    Attributes:
        adapter: the class, called as `adapter(pipeline, name=, facts=, compile=)`.
        pipelines: names of the diffusers pipeline classes that it reads.
        half: torch dtype that its networks are loaded in on an accelerator.
    """

    adapter: type
    pipelines: tuple[str, ...]
    half: str


class DiffusersModel(ABC):
    """Base of the adapters; fills the shared part of :class:`retour.core.model.Model`.

    A subclass sets `path`, `prediction`, `capabilities` and `multiple`, and says how its network is
    called, how its prompts are encoded and where its attention layers are.

    Args:
        pipe: a diffusers pipeline; left exactly as it is.
        network: name of the pipeline's component that denoises.
        name: what the model is called; by default where the pipeline came from.
        facts: `default_steps`, `default_guidance`, `native` (the side, in pixels, that it was
            trained at) where they differ from the pipeline's own.
        compile: run the network through `torch.compile`.
    """

    path: Path
    prediction: str
    capabilities: frozenset[str]
    multiple: int
    # Latent cells, along each side, that are one token of the network's input channels.
    packed: ClassVar[int] = 1
    guidance_argument: ClassVar[str] = "guidance_scale"

    def __init__(
        self,
        pipe: Any,
        network: str,
        *,
        name: str | None = None,
        facts: Mapping[str, Any] | None = None,
        compile: bool = False,
    ):
        self.pipe = pipe
        self.net: Any = getattr(pipe, network)
        self.run: Any = torch.compile(self.net) if compile else self.net
        self.name = name or pipe.config.get("_name_or_path") or type(pipe).__name__
        self.codec = Codec(pipe.vae)
        channels = self.codec.channels * self.packed**2
        if self.net.config.in_channels != channels:
            raise RetourError(
                f"{self.name!r} has a network of {self.net.config.in_channels} input channels for "
                f"latents of {channels} (inpainting, instructions): load the base model"
            )
        self.train_steps: int = pipe.scheduler.config.num_train_timesteps
        facts = {} if facts is None else facts
        self.default_steps = int(
            facts.get("default_steps", default_of(pipe, "num_inference_steps", STEPS))
        )
        self.default_guidance = float(
            facts.get("default_guidance", default_of(pipe, self.guidance_argument, GUIDANCE))
        )
        self.native = int(facts.get("native", self.codec.factor * self._sample_size()))
        self.towers = _towers(pipe)
        self._prompts: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._prompts_of: object = None
        self._fingerprint: tuple[object, str] = (None, "")

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return execution_device(self.net)

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        # The property of diffusers visits every parameter: a millisecond in each call.
        dtype: torch.dtype = next(self.net.parameters()).dtype
        return dtype if dtype in NATIVE_TYPES else self.net.dtype

    @property
    def fingerprint(self) -> str:
        """Short hash of weights and config, the same after a reload; see :mod:`.fingerprint`."""
        parts = {"network": self.net, "vae": self.pipe.vae}
        parts |= {f"text{k}": tower.encoder for k, tower in enumerate(self.towers)}
        version = weight_version(parts)
        if self._fingerprint[0] != version:
            self._fingerprint = (version, fingerprint(parts, self._facts()))
        return self._fingerprint[1]

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> scaled float64 latents (B, C, h, w), posterior mode."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise RetourError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        self.latent_shape(*images.shape[-2:])
        return self.codec.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> float32 images (B, 3, H, W), about [-1, 1]."""
        return self.codec.decode(latents)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latents of an image of that size, which must fit the network."""
        if height < 1 or width < 1 or height % self.multiple or width % self.multiple:
            raise RetourError(
                f"{self.name!r} takes image sides in multiples of {self.multiple}, "
                f"got {width} x {height} (width x height)"
            )
        factor = self.codec.factor
        return self.codec.channels, height // factor, width // factor

    def embed(self, prompts: Sequence[str], *, size: tuple[int, int] | None = None) -> Condition:
        """Encode B prompts, as the pipeline's own `encode_prompt` does.

        Encodings are kept for the last prompts used, and forgotten when the text encoders' weights
        change. A prompt that is too long is cut, with a warning that quotes the part not read.

        Args:
            prompts: B texts; "" is the unconditional prompt.
            size: (height, width) of the image, for models that condition on it; `native` by
                default.
        """
        prompts = tuple(prompts)
        if not prompts or not all(isinstance(p, str) for p in prompts):
            raise RetourError(f"prompts must be a list of at least one text, got {prompts!r}")
        for prompt in prompts:
            _check_text(prompt)
        rows = self._encoded(prompts)
        tensors = {k: torch.cat([row[k] for row in rows]) for k in rows[0]}
        height, width = (self.native, self.native) if size is None else size
        return Condition(tensors | self._size_tensors(len(prompts), height, width), prompts)

    def tokens(self, prompt: str) -> Tokens:
        """Tokenise one prompt; positions count along the text sequence that the network sees."""
        return self.towers[0].tokens(prompt)

    @abstractmethod
    def network(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Bare network: latents (R, C, h, w) and path times (R,) -> raw float64 output."""

    @abstractmethod
    def grid(self, steps: int, *, size: tuple[int, int] | None = None) -> Grid:
        """The model's own sampling grid for images of `size` (height, width), `native` if None."""

    @abstractmethod
    def attention_sites(self) -> list[AttentionSite]:
        """All attention layers of the network, in order of execution."""

    def feature_sites(self) -> list[FeatureSite]:
        """All modules whose outputs hooks may address, in order of execution."""
        return []

    @abstractmethod
    def _encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode distinct prompts to named (B, ...) tensors."""

    def _sample_size(self) -> int:
        """Side of the latents that the network was trained at."""
        return _side(self.net.config.sample_size)

    def _size_tensors(self, count: int, height: int, width: int) -> dict[str, Tensor]:
        return {}

    def _facts(self) -> dict[str, Any]:
        """What determines the function computed, beside the weights."""
        return {"family": type(self).__name__, "prediction": self.prediction}

    def _encoded(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        version = weight_version({str(k): tower.encoder for k, tower in enumerate(self.towers)})
        if version != self._prompts_of:
            self._prompts.clear()
            self._prompts_of = version
        new = [p for p in dict.fromkeys(prompts) if p not in self._prompts]
        if new:
            self._warn_of_cuts(new)
            tensors = self._encode(new)
            for i, prompt in enumerate(new):
                self._prompts[prompt] = {k: v[i : i + 1] for k, v in tensors.items()}
        for prompt in prompts:
            self._prompts.move_to_end(prompt)
        rows = [self._prompts[p] for p in prompts]
        while len(self._prompts) > PROMPTS_KEPT:
            self._prompts.popitem(last=False)
        return rows

    def _warn_of_cuts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            cut = self.tokens(prompt).cut
            if cut:
                logger.warning(
                    "the prompt %s is too long for %s: %s is not read",
                    quote(prompt),
                    self.name,
                    quote(cut),
                )


def _towers(pipe: Any) -> tuple[TextTower, ...]:
    towers = []
    for suffix in TOWERS:
        encoder = getattr(pipe, f"text_encoder{suffix}", None)
        tokenizer = getattr(pipe, f"tokenizer{suffix}", None)
        if encoder is not None and tokenizer is not None:
            towers.append(_tower(pipe, tokenizer, encoder))
    if not towers:
        raise RetourError(
            f"the pipeline {type(pipe).__name__} has no text encoder: load one with it"
        )
    return tuple(towers)


def _tower(pipe: Any, tokenizer: Any, encoder: nn.Module) -> TextTower:
    limit = text_limit(tokenizer, encoder)
    if not hasattr(pipe, "maybe_convert_prompt"):
        return TextTower(tokenizer, encoder, limit)

    def convert(prompt: str) -> str:
        # Only words of several vectors are rewritten; the tokenizer remarks on any long prompt.
        if not any(name.endswith("_1") for name in tokenizer.added_tokens_encoder):
            return prompt
        converted: str = pipe.maybe_convert_prompt(prompt, tokenizer)
        return converted

    return TextTower(tokenizer, encoder, limit, convert)


def _check_text(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise RetourError(
            f"the prompt {quote(prompt)} has a character that is none (number {error.start + 1}): "
            "write it in UTF-8"
        ) from None


def default_of(
    pipe: Any, argument: str, otherwise: float, *, method: str = "__call__"
) -> float | int:
    """A pipeline's own default of an argument of one of its methods."""
    parameter = inspect.signature(getattr(type(pipe), method)).parameters.get(argument)
    return otherwise if parameter is None else parameter.default


def _side(sample_size: int | Sequence[int]) -> int:
    return sample_size if isinstance(sample_size, int) else min(sample_size)
