"""Which network call of a denoiser is in progress, for all that hooks into its network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from ..core.branches import Denoiser, Rows
from ..core.grid import Step
from ..core.model import Condition, Model


@dataclass(frozen=True)
class NetworkCall:
    """A network call in progress.

    Attributes:
        t: its path time.
        rows: names of its R batch rows.
        latent: (height, width) of its latents.
        text: number of its text tokens.
    """

    t: float
    rows: Rows
    latent: tuple[int, int]
    text: int


class Hooks:
    """Handle of a :func:`tapped` context.

    Attributes:
        step: the interval being crossed, kept up to date by the loop.
        current: the denoiser's network call in progress; None outside of one.
    """

    def __init__(self, denoiser: Denoiser):
        self.denoiser = denoiser
        self.step: Step | None = None
        self.current: NetworkCall | None = None

    @contextmanager
    def during(self, x: Tensor, t: Tensor, condition: Condition) -> Iterator[None]:
        """Describe the network call that runs inside, if its rows are the denoiser's."""
        rows, before = self.denoiser.rows, self.current
        height, width = x.shape[-2:]
        call = NetworkCall(float(t.flatten()[0]), rows, (height, width), _text_tokens(condition))
        self.current = call if len(rows) == len(x) else None
        try:
            yield
        finally:
            self.current = before


@contextmanager
def tapped(denoiser: Denoiser) -> Iterator[Hooks]:
    """Know which of the denoiser's network calls is in progress; contexts nest."""
    hooks, model = Hooks(denoiser), denoiser.model
    denoiser.model = cast(Model, _Tap(model, hooks))
    try:
        yield hooks
    finally:
        denoiser.model = model


class _Tap:
    """The model of a hooked denoiser: tells the hooks which network call is in progress."""

    def __init__(self, model: Model, hooks: Hooks):
        self._model = model
        self._hooks = hooks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def network(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """As the model's, watched."""
        with self._hooks.during(x, t, condition):
            return self._model.network(x, t, condition)


def _text_tokens(condition: Condition) -> int:
    embeds = condition.tensors.get("embeds")
    return 0 if embeds is None else embeds.shape[1]
