"""Classifiers under evaluation: the small ones that ship with retour, and a user's own.

A classifier is anything that takes images (B, 3, H, W) in [0, 1] to logits (B, K) and lets
gradients through. :class:`Classifier` adds what such a function needs from outside: the size of its
input, its normalisation and the names of its classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import RetourError, unknown
from ..io import to_tensor
from ._nets import ARCHITECTURES

WEIGHTS = Path(__file__).parent.parent / "weights"
PREFIX = "emoji-classifier-"
CONFIG, TENSORS = "config.json", "model.safetensors"

ClassifierLike: TypeAlias = "Classifier | nn.Module | Callable[[Tensor], Tensor] | str | Path"


@dataclass(frozen=True)
class Classifier:
    """A differentiable image classifier.

    Attributes:
        function: normalised images (B, 3, h, w) -> logits (B, K); a torch module, or any callable.
        name: how records call it.
        labels: names of the K classes; without them classes are numbers.
        size: side, or (height, width), that images are resized to; None leaves them as they are.
        mean: subtracted from the channels, of images in [0, 1].
        std: divided by afterwards.
        resize: how images are resized; the paper's code takes the nearest pixel.
    """

    function: Callable[[Tensor], Tensor]
    name: str = "classifier"
    labels: tuple[str, ...] = ()
    size: int | tuple[int, int] | None = None
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    resize: Literal["nearest", "bilinear"] = "nearest"

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> float64 logits (B, K), differentiable in the images."""
        x = self._resized(images.float())
        mean, std = (x.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        x = (x - mean) / std
        if isinstance(self.function, nn.Module):
            like = next(self.function.parameters(), x)
            x = x.to(like.device, like.dtype)
        logits = self.function(x)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise RetourError(
                f"classifier {self.name!r} must return logits of shape ({len(images)}, classes) "
                f"for {len(images)} images, it returned {shape}"
            )
        # Probabilities near 1 still have a gradient in float64.
        return logits.to(images.device).double()

    def _resized(self, x: Tensor) -> Tensor:
        if self.size is None:
            return x
        size = (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)
        if tuple(x.shape[-2:]) == size:
            return x
        if self.resize == "nearest":
            return F.interpolate(x, size, mode="nearest")
        return F.interpolate(x, size, mode="bilinear", antialias=True)

    def index(self, label: str | int) -> int:
        """Number of a class, by name or by number; unknown names are refused with the nearest."""
        if isinstance(label, str) and label in self.labels:
            return self.labels.index(label)
        number = _number(label)
        if number is None or number < 0 or (self.labels and number >= len(self.labels)):
            if self.labels:
                raise unknown(f"label of {self.name!r}", label, self.labels)
            raise RetourError(
                f"classifier {self.name!r} has no class names: give the class as a number of at "
                f"least 0, got {label!r}"
            )
        return number

    def label(self, index: int) -> str:
        """Name of a class, or its number as text."""
        return self.labels[index] if index < len(self.labels) else str(index)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The module in evaluation mode, each part back in its own mode afterwards."""
        modules = list(self.function.modules()) if isinstance(self.function, nn.Module) else []
        training = [module for module in modules if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


def _number(label: str | int) -> int | None:
    if isinstance(label, bool):
        return None
    if isinstance(label, int):
        return label
    return int(label) if isinstance(label, str) and label.isdecimal() else None


def embedded_classifiers() -> dict[str, dict[str, Any]]:
    """Configurations of the classifiers that ship with retour, by name."""
    folders = sorted(path.parent for path in WEIGHTS.glob(f"{PREFIX}*/{CONFIG}"))
    return {f"emoji-{folder.name.removeprefix(PREFIX)}": _config(folder) for folder in folders}


def load_classifier(source: ClassifierLike = "emoji-cnn", **options: Any) -> Classifier:
    """Make a classifier ready for evaluation.

    Args:
        source: name of an embedded classifier, a folder as `retour.train.classifier` writes it, a
            torch module, or any callable (B, 3, H, W) in [0, 1] -> logits (B, K).
        options: for a module or callable, the other attributes of :class:`Classifier`: `name`,
            `labels`, `size`, `mean`, `std`, `resize`.

    Raises:
        RetourError: there is no such classifier, or its files cannot be read.
    """
    if isinstance(source, (str, Path)):
        if options:
            raise RetourError(
                f"a stored classifier has its own settings, without {' or '.join(options)}: load "
                "it as it is, or pass the module"
            )
        return _stored(str(source))
    if isinstance(source, Classifier):
        return source
    if not callable(source):
        raise RetourError(
            f"a classifier is a name, a folder, a torch module or a callable, not {source!r}"
        )
    options.setdefault("name", type(source).__name__ if isinstance(source, nn.Module) else "own")
    return Classifier(source, **options)


def _stored(source: str) -> Classifier:
    if source in embedded_classifiers():
        return _embedded(source)
    folder = Path(source)
    if not (folder / CONFIG).is_file():
        raise unknown("classifier", source, embedded_classifiers())
    return _read(folder)


@lru_cache
def _embedded(name: str) -> Classifier:
    return _read(WEIGHTS / f"{PREFIX}{name.removeprefix('emoji-')}")


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RetourError(f"'{folder / CONFIG}' cannot be read as JSON ({error})") from None
    if not isinstance(config, dict) or config.get("architecture") not in ARCHITECTURES:
        raise RetourError(
            f"'{folder / CONFIG}' does not describe a classifier: its architecture must be one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    return config


def _read(folder: Path) -> Classifier:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = _config(folder)
    try:
        labels = tuple(str(label) for label in config["labels"])
        net = ARCHITECTURES[config["architecture"]](len(labels), **config["arguments"])
        net.load_state_dict({k: v.float() for k, v in load_file(folder / TENSORS).items()})
        settings = {k: tuple(config[k]) for k in ("mean", "std")}
    except (OSError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise RetourError(f"the classifier in '{folder}' cannot be read ({reason})") from None
    return Classifier(
        net.eval().requires_grad_(False),
        name=str(config.get("name", folder.name)),
        labels=labels,
        size=int(config["size"]),
        resize="bilinear",
        **settings,
    )


def write_classifier(net: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Write a classifier as :func:`load_classifier` reads it: half precision and a JSON file."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.half().contiguous().cpu() for k, v in net.state_dict().items()}
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    (folder / TENSORS).chmod(0o644)
    text = json.dumps(config, indent=1, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def stacked(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as a classifier takes them, (B, 3, H, W) in [0, 1]."""
    return torch.stack([to_tensor(picture) for picture in pictures]) / 2 + 0.5


def wrongness(logits: Tensor, labels: Tensor) -> Tensor:
    """Best wrong logit minus the right one, (B,): above 0 the classifier is wrong.

    Args:
        logits: (B, K), K at least 2.
        labels: (B,) right classes.
    """
    right = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(right, -torch.inf).amax(1) - logits[right]


@torch.no_grad()
def margins(classifier: Classifier, images: Tensor, labels: Tensor) -> list[float]:
    """By how much a classifier is wrong about images (B, 3, H, W) in [0, 1], see `wrongness`."""
    with classifier.evaluating():
        margin: list[float] = wrongness(classifier(images), labels).tolist()
    return margin


@torch.no_grad()
def predictions(classifier: Classifier, images: Tensor) -> list[dict[str, Any]]:
    """What a classifier says of images (B, 3, H, W) in [0, 1]: label and confidence of each."""
    with classifier.evaluating():
        best = classifier(images).softmax(1).max(1)
    return [
        {"label": classifier.label(int(k)), "confidence": float(share)}
        for share, k in zip(best.values, best.indices, strict=True)
    ]
