"""Proposes a source prompt for a picture, from the captions that the embedded CLIP knows.

Two rounds of scoring keep the number of captions small: first every style and concept, then the best
few of these with every colour and background. The result is a guess among known captions, and every
record says when it was used.
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

from .io import to_tensor

KEEP = 6
CHUNK = 512


class Captioner:
    """The embedded CLIP and its vocabulary of captions.

    Args:
        folder: a transformers CLIP folder with a `captions.json` (lists `styles`, `concepts`,
            `colours` and `backgrounds`; concepts ending in ``*`` take no article).
    """

    def __init__(self, folder: Path):
        from transformers import CLIPModel, CLIPTokenizer

        self.model = CLIPModel.from_pretrained(folder).float().eval().requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.vocabulary = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
        self._known: dict[str, Tensor] = {}

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> unit vectors (N, D)."""
        missing = [t for t in dict.fromkeys(texts) if t not in self._known]
        for start in range(0, len(missing), CHUNK):
            part = missing[start : start + CHUNK]
            tokens = self.tokenizer(part, padding="max_length", truncation=True, return_tensors="pt")
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
        plain = [(s, "", c, "") for s, c in itertools.product(v["styles"], v["concepts"])]
        best = self._best(image, plain, KEEP)
        full = [
            (style, colour, concept, ground)
            for style, _, concept, _ in best
            for colour, ground in itertools.product(["", *v["colours"]], v["backgrounds"])
        ]
        return caption(*self._best(image, full, 1)[0])

    def _best(self, image: Tensor, parts: list[tuple[str, ...]], count: int) -> list[Any]:
        scores = self.embed_texts([caption(*p) for p in parts]) @ image
        return [parts[i] for i in scores.topk(count).indices.tolist()]


def caption(style: str, colour: str, concept: str, background: str) -> str:
    """Put a caption together; empty parts are left out."""
    noun = _with_article(f"{colour} {concept}".strip())
    ground = f"on {_with_article(background)} background" if background else ""
    return " ".join(part for part in (style, noun, ground) if part)


def _with_article(noun: str) -> str:
    if noun.endswith("*"):
        return noun[:-1]
    vowel = noun[0] in "aeiou" and not noun.startswith(("uni", "ufo", "eu", "one"))
    return f"{'an' if vowel else 'a'} {noun}"


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
