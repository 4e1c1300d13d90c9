"""What users give a run, read and checked: a model, pictures, prompts, a guidance scale, masks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from .captions import propose
from .core.model import Model
from .core.state import Inversion
from .errors import RetourError, check_range
from .io import Clip, Placement, fit, fit_clip, read_clip, read_image, to_tensor
from .models.load import load

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ModelLike: TypeAlias = "Model | DiffusionPipeline | str"
MAX_GUIDANCE = 100.0


def as_model(model: ModelLike) -> Model:
    """Load names, folders and pipelines; pass models through."""
    return model if isinstance(model, Model) else load(model)


def model_of(inversion: Any) -> Model:
    """The live model of an inversion; what is none is refused, as a path or a model is."""
    if not isinstance(inversion, Inversion):
        raise RetourError(
            "the way back begins with an inversion, from retour.invert or Inversion.load, "
            f"not with {type(inversion).__name__}"
        )
    return inversion.attached()


def listed(given: Any) -> list[Any]:
    """Several of something as a list, one alone as a list of one."""
    return list(given) if isinstance(given, (list, tuple)) else [given]


def one_each(what: str, given: Any, images: int) -> list[Any]:
    """One value for each image: a list has them, anything else is for all.

    Raises:
        RetourError: a list of another length; it says so of `what`.
    """
    values = list(given) if isinstance(given, (list, tuple)) else [given] * images
    if len(values) != images:
        raise RetourError(
            f"{len(values)} {what} for {images} images: give one, or one for each image"
        )
    return values


def prompts_of(prompt: str | Sequence[str], images: int) -> tuple[str, ...]:
    """A prompt for each image: one for all, or one each."""
    return tuple(one_each("prompts", _texts("prompt", prompt), images))


def _texts(what: str, given: Any) -> str | list[str]:
    """A text, or several as a list; anything else is refused."""
    if isinstance(given, str):
        return given
    texts = [*given] if isinstance(given, Iterable) else [given]
    if not all(isinstance(text, str) for text in texts):
        raise RetourError(f"{what} must be a prompt or a list of prompts, got {given!r}")
    return texts


def prompts_or_proposed(
    prompt: str | Sequence[str] | None, pictures: Sequence[Image.Image | Clip]
) -> tuple[tuple[str, ...], bool]:
    """A prompt for each picture, and whether the caption proposer was asked for them."""
    if prompt is None:
        stills = [p.still if isinstance(p, Clip) else p for p in pictures]
        return tuple(propose(stills)), True
    return prompts_of(prompt, len(pictures)), False


def guidance_of(model: Model, guidance: float | None) -> float:
    """The guidance scale; None takes the model's."""
    if guidance is None:
        return model.default_guidance
    check_range("guidance", guidance, 0, MAX_GUIDANCE)
    return float(guidance)


def fit_all(model: Model, image: Any) -> tuple[list[Any], list[Placement]]:
    """Pictures (of a video model: clips) at one size that suits the model, and where they go."""
    sources = listed(image)
    if not sources:
        raise RetourError("there is no image to invert: pass at least one")
    size: dict[str, Any] = {"native": model.native, "multiple": model.multiple}
    if "video" in model.capabilities:
        fitted: list[tuple[Any, Placement]] = [fit_clip(read_clip(s), **size) for s in sources]
    else:
        fitted = [fit(read_image(s), **size) for s in sources]
    one_canvas({p.canvas for _, p in fitted}, "invert")
    return [picture for picture, _ in fitted], [placement for _, placement in fitted]


def one_canvas(canvases: Collection[tuple[int, int]], todo: str) -> tuple[int, int]:
    """The one (width, height) that all pictures of a batch need.

    Raises:
        RetourError: there are several; it says what is to be done in batches (`todo`).
    """
    if len(canvases) > 1:
        sizes = ", ".join(f"{w} x {h}" for w, h in sorted(canvases))
        raise RetourError(
            f"the images of one batch must fit the model at one size, these need {sizes}: "
            f"{todo} them in batches of equal aspect ratio"
        )
    return next(iter(canvases))


def targets_of(target: str | Sequence[str], images: int) -> dict[str, tuple[str, ...]]:
    """Target branches by name, each with a prompt for every image.

    Args:
        target: one prompt for all images; or one each; or several for a single image.
        images: number of images.
    """
    texts = _texts("target", target)
    given = [texts] if isinstance(texts, str) else texts
    if not given:
        raise RetourError("there is no target: give a prompt or a list of prompts")
    if not all(t.strip() for t in given):
        raise RetourError(f"a target prompt is empty: say what the edit shall show, got {given!r}")
    if images == 1 and len(given) > 1:
        return {f"target{k}": (prompt,) for k, prompt in enumerate(given)}
    wanted = given[0] if len(given) == 1 else given
    return {"target": tuple(one_each("target prompts", wanted, images))}


def masks_of(mask: Any, inversion: Inversion) -> Tensor | None:
    """Masks (B, 1, h, w) in [0, 1], 1 where editing is allowed; for clips (B, 1, 1, h, w)."""
    if mask is None:
        return None
    size = (inversion.latents.shape[-1], inversion.latents.shape[-2])
    given = one_each("masks", mask, inversion.images)
    values = torch.stack([_read_mask(one, size) for one in given])
    # One mask for all frames of a clip.
    return values if inversion.latents.ndim == 4 else values[:, :, None]


def _read_mask(mask: Any, size: tuple[int, int]) -> Tensor:
    picture = read_image(mask).convert("L").resize(size, Image.Resampling.BOX)
    values = to_tensor(picture.convert("RGB"))[:1].double() / 2 + 0.5
    if float(values.max()) == 0:
        raise RetourError("the mask is black everywhere: paint white where the edit may act")
    return values
