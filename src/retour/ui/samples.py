"""The pictures that a visitor may start from, with an edit of each that is known to work."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from PIL import Image

from ..demo import examples
from ..errors import unknown


@dataclass(frozen=True)
class Sample:
    """A picture to try.

    Attributes:
        name: of the picture.
        picture: the picture.
        prompt: what it shows.
        target: what it might show instead.
    """

    name: str
    picture: Image.Image
    prompt: str
    target: str


@lru_cache(1)
def samples() -> dict[str, Sample]:
    """All of them by name; the target is the gallery's first plain edit of the picture."""
    pictures, edits = examples()
    found = {}
    for name, (picture, prompt) in pictures.items():
        targets = [e.target for e in edits if e.image == name and e.target != prompt]
        found[name] = Sample(name, picture, prompt, targets[0] if targets else "")
    return found


def sample(name: str) -> Sample:
    """One of them."""
    if name not in samples():
        raise unknown("example", name, samples())
    return samples()[name]
