"""A store of inversions by what they were made from, so that none is made twice.

An entry's key is the hash of *every* input that decides its values: the pictures' pixels, in the
order of the batch (which decides the last bits), prompts, negative prompt, the model's fingerprint,
type and device, the inverter with all its options, the grid's times, guidance, seed, and the
formats and versions that made it. No file name and no date is part of it.

An entry is an inversion file (`KEY.safetensors`, as `Inversion.save` writes it) and, written after
it, `KEY.json` with its checksum and inputs. Both are renamed into place, so a killed process leaves
no half entry; one that does not match its checksum is dropped and made again. Beyond the size
bound, the entries that were not used for longest are removed.

What `fetch` returns has always been through its file, also when it was just made: a run that finds
its inversions in the store and one that makes them compute with the same bits.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..errors import RetourError, check_range
from ..io import plain, save_json
from ..record import versions
from .registry import get
from .state import FORMAT, Inversion

if TYPE_CHECKING:
    from .model import Model

LIMIT = 4 * 2**30
CHUNK = 2**20
DECISIVE = ("retour", "torch", "diffusers", "transformers")


def pixel_hash(image: Image.Image) -> str:
    """Hash of a picture's size, mode and pixels."""
    head = f"{image.mode} {image.size[0]} x {image.size[1]}\n".encode()
    return hashlib.sha256(head + image.tobytes()).hexdigest()


def content_hash(values: Any) -> str:
    """Hash of plain values, whatever the order of their keys."""
    text = json.dumps(plain(values), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def inversion_inputs(
    model: Model,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    *,
    method: str,
    steps: int,
    guidance: float,
    negative: str = "",
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Everything that decides an inversion, as plain values; arguments as those of `invert`."""
    made = get("invert", method).make(**options)
    return {
        "format": FORMAT,
        "versions": {name: versions()[name] for name in DECISIVE},
        "model": model.fingerprint,
        "dtype": str(getattr(model, "dtype", "")),
        "device": model.device.type,
        "size": [model.native, model.multiple],
        "times": list(model.grid(steps).times),
        "images": [pixel_hash(image) for image in images],
        "prompts": list(prompts),
        "negative": negative,
        "method": method,
        "options": asdict(made.options) if hasattr(made, "options") else dict(options),
        "guidance": float(guidance),
        "seed": seed,
    }


class InversionCache:
    """Inversions in a folder, by the hash of their inputs.

    Args:
        folder: where they lie; made if it is not there.
        limit: bytes that all entries may take together.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int = LIMIT):
        check_range("the size of the cache", limit, 0)
        self.folder, self.limit = Path(folder), limit
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RetourError(
                f"cannot make the cache '{folder}' ({error.strerror}): choose another folder"
            ) from None

    def fetch(
        self, inputs: Mapping[str, Any], make: Callable[[], Inversion], model: Model
    ) -> tuple[Inversion, bool]:
        """The inversion of these inputs, and whether it was there; if not, `make` makes it."""
        key = content_hash(inputs)
        found = self.get(key, model)
        if found is not None:
            return found, True
        made = make()
        self.put(key, made, inputs)
        again = self.get(key, model)
        self.evict()
        return made if again is None else again, False

    def get(self, key: str, model: Model | None = None) -> Inversion | None:
        """The entry, marked as used; None if there is none, a damaged one being dropped."""
        tensors, facts = self._paths(key)
        if not (tensors.is_file() and facts.is_file()):
            return None
        try:
            known = json.loads(facts.read_text(encoding="utf-8"))["sha256"]
            if file_hash(tensors) != known:
                raise RetourError(f"'{tensors}' does not match its checksum")
            inversion = Inversion.load(tensors, model)
        except (OSError, ValueError, KeyError, TypeError):  # RetourError is a ValueError
            self.drop(key)
            return None
        os.utime(facts)
        return inversion

    def put(self, key: str, inversion: Inversion, inputs: Mapping[str, Any] | None = None) -> None:
        """Store an inversion; `inputs` are kept beside it for people to read."""
        tensors, facts = self._paths(key)
        inversion.save(tensors)
        save_json({"sha256": file_hash(tensors), "inputs": {} if inputs is None else inputs}, facts)

    def drop(self, key: str) -> None:
        """Remove an entry; none is fine."""
        for path in reversed(self._paths(key)):
            path.unlink(missing_ok=True)

    def evict(self) -> None:
        """Remove the entries that were not used for longest until the rest fits the bound."""
        entries = sorted(self._entries(), reverse=True)
        total = 0
        for _, key, size in entries:
            total += size
            if total > self.limit:
                self.drop(key)

    def __len__(self) -> int:
        return len(self._entries())

    def _entries(self) -> list[tuple[int, str, int]]:
        """(last use, key, bytes) of all entries; what another process removes meanwhile is not."""
        found = []
        for path in self.folder.iterdir():
            if path.suffix == ".safetensors" and not path.name.startswith("."):
                try:
                    mark = self._paths(path.stem)[1]
                    used = (mark if mark.exists() else path).stat().st_mtime_ns
                    found.append((used, path.stem, path.stat().st_size))
                except OSError:
                    continue
        return found

    def _paths(self, key: str) -> tuple[Path, Path]:
        return self.folder / f"{key}.safetensors", self.folder / f"{key}.json"


def file_hash(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
