"""Proposes a source prompt for a picture, from the captions that the embedded CLIP knows.

Three rounds of scoring keep the number of captions small: first the background, then every style
and concept on it, then the best few of these in every colour. The result is a guess among known
captions, and every record says when it was used.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .data.scenes import with_article
from .io import to_tensor
from .models.quiet import quietly

Parts = tuple[str, str, str, str]

KEEP = 6
PROBES = 8
CHUNK = 512


class Captioner:
    """The embedded CLIP and its vocabulary of captions.

    Args:
        folder: a transformers CLIP folder with a `captions.json` (lists `styles`, `concepts`,
            `colours` and `backgrounds`; concepts carry their article).
    """

    def __init__(self, folder: Path):
        from transformers import CLIPModel, CLIPTokenizer

        with quietly():
            model = CLIPModel.from_pretrained(folder)
        self.model = model.float().eval().requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.vocabulary = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
        self._known: dict[str, Tensor] = {}

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> unit vectors (N, D)."""
        missing = [t for t in dict.fromkeys(texts) if t not in self._known]
        for start in range(0, len(missing), CHUNK):
            part = missing[start : start + CHUNK]
            tokens = self.tokenizer(part, padding=True, truncation=True, return_tensors="pt")
            vectors = _features(self.model.get_text_features(**tokens))
            self._known.update(zip(part, vectors, strict=True))
        return torch.stack([self._known[t] for t in texts])

    def embed_images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pictures -> unit vectors (B, D)."""
        side = self.model.config.vision_config.image_size
        pixels = torch.stack([to_tensor(p.resize((side, side))) for p in pictures])
        return _features(self.model.get_image_features(pixel_values=pixels))

    def propose(self, picture: Image.Image) -> str:
        """Best-scoring caption for one picture."""
        image = self.embed_images([picture])[0]
        v = self.vocabulary
        ground = self._background(image)
        plain = [(s, "", c, ground) for s, c in itertools.product(v["styles"], v["concepts"])]
        best = self._best(image, plain, KEEP)
        full = [
            (style, colour, concept, ground)
            for style, _, concept, _ in best
            for colour in ["", *v["colours"]]
        ]
        return caption(*self._best(image, full, 1)[0])

    def _background(self, image: Tensor) -> str:
        """The background that fits best on average over a few concepts."""
        v = self.vocabulary
        some = v["concepts"][:: max(1, len(v["concepts"]) // PROBES)]
        parts = itertools.product(v["backgrounds"], v["styles"], some)
        texts = [caption(style, "", concept, ground) for ground, style, concept in parts]
        scores = (self.embed_texts(texts) @ image).view(len(v["backgrounds"]), -1).mean(1)
        return str(v["backgrounds"][int(scores.argmax())])

    def _best(self, image: Tensor, parts: Sequence[Parts], count: int) -> list[Parts]:
        scores = self.embed_texts([caption(*p) for p in parts]) @ image
        return [parts[i] for i in scores.topk(count).indices.tolist()]


def caption(style: str, colour: str, concept: str, background: str) -> str:
    """Put a caption together; empty parts are left out.

    Args:
        style: such as "a 3d render of".
        colour: such as "red".
        concept: with its article, such as "an apple"; nouns without one stay without.
        background: such as "on a sky blue background".
    """
    return " ".join(p for p in (style, _coloured(colour, concept), background) if p)


def _coloured(colour: str, concept: str) -> str:
    article, _, noun = concept.partition(" ")
    if not colour:
        return concept
    if article not in ("a", "an"):
        return f"{colour} {concept}"
    return with_article(f"{colour} {noun}")


def _features(output: Any) -> Tensor:
    # transformers 5 returns an output object where earlier versions return the tensor.
    vectors = output if isinstance(output, Tensor) else output.pooler_output
    return torch.nn.functional.normalize(vectors.float(), dim=-1)


@functools.lru_cache(1)
def captioner() -> Captioner:
    """The embedded one, loaded once."""
    return Captioner(Path(str(files("retour") / "weights" / "clip")))


def propose(pictures: Sequence[Image.Image]) -> list[str]:
    """One proposed prompt for each picture."""
    with torch.no_grad():
        return [captioner().propose(picture) for picture in pictures]
