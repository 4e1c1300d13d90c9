"""The models that a page offers: those that it was started with, loaded when first wanted."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

from ..core.model import Model
from ..errors import RetourError, unknown
from ..models.load import embedded, load

Names = dict[str, str]


class Shelf:
    """Models by the name that the page shows.

    Args:
        more: folders or hub ids beside the embedded models, as the operator gave them.
        device: where they run.
        dtype: type of their weights.
    """

    def __init__(
        self, more: Sequence[str] = (), *, device: str | None = None, dtype: str | None = None
    ):
        self.device, self.dtype = device, dtype
        self.sources: Names = {name: name for name in embedded()}
        for source in more:
            self.sources[_shown(source)] = source
        if not self.sources:
            raise RetourError("there is no model to offer: name one with --model")
        self._loaded: dict[str, Model] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """What may be chosen; the usual model first."""
        return sorted(self.sources, key=lambda n: (n != "emoji-unet", n not in embedded(), n))

    def source(self, name: str) -> str:
        """What `retour.load` takes for a name on the shelf."""
        if name not in self.sources:
            raise unknown("model", name, self.sources)
        return self.sources[name]

    def shown(self, source: str) -> str:
        """The name on the shelf of what `source` gave."""
        return next(name for name, given in self.sources.items() if given == source)

    def get(self, name: str) -> Model:
        """A model of the shelf; nothing else can be loaded."""
        source = self.source(name)
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = load(source, device=self.device, dtype=self.dtype)
            return self._loaded[name]

    def summary(self, name: str) -> str:
        """One line about a model."""
        return str(embedded().get(self.source(name), {}).get("summary", ""))


def _shown(source: str) -> str:
    """A folder's own name; hub ids as they are."""
    path = Path(source).expanduser()
    return path.resolve().name if path.is_dir() else source
