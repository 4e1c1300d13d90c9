"""Feature hooks: read or replace what a module of the network returns.

A hooked module's `forward` is stood in for by one that runs whatever was there before (the
module's own, or an offloading hook's) and hands the image's features to the controls. Afterwards,
also after an exception, the module has exactly the `forward` it had, in the place it had it.

The same holds as for attention hooks (:mod:`.hooks`): controls fold in the order given, outer
contexts before inner ones; only calls made through the hooked denoiser are controlled; features are
returned, never edited in place, so gradients flow; a hooked module is a graph break under
`torch.compile`; nothing counts calls. A checkpointed block that runs again for its gradient is no
call in progress any more: controls see it once, so only *reading* is sound under checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.branches import Denoiser, Rows
from ..core.grid import Step
from ..core.model import FeatureSite
from ._tap import Hooks, tapped


@dataclass(frozen=True)
class FeatureCall:
    """One module's output being handed over.

    Attributes:
        site: the module.
        step: the interval being crossed; None outside of :func:`retour.core.loop.walk`.
        t: path time of the network call.
        rows: names of the R batch rows.
        latent: (height, width) of the latents given to the network.
    """

    site: FeatureSite
    step: Step | None
    t: float
    rows: Rows
    latent: tuple[int, int]


class FeatureControl:
    """Base of everything that reads or changes features. Each method is a no-op by default."""

    def wants(self, site: FeatureSite) -> bool:
        """Whether to hook that module at all; asked once, before the run."""
        return True

    def active(self, call: FeatureCall) -> bool:
        """Whether to take part in this call."""
        return True

    def output(self, call: FeatureCall, value: Tensor) -> Tensor:
        """Features to go on with: (R, C, h, w), or (R, image tokens, C)."""
        return value


@contextmanager
def watched(denoiser: Denoiser, controls: Sequence[FeatureControl]) -> Iterator[Hooks]:
    """Let `controls` take part in the denoiser's network calls.

    Yields:
        The hooks, whose attribute `step` the loop keeps up to date.
    """
    with ExitStack() as undo:
        hooks = undo.enter_context(tapped(denoiser))
        for site in denoiser.model.feature_sites():
            chosen = tuple(c for c in controls if c.wants(site))
            if chosen:
                _install(site, hooks, chosen, undo)
        yield hooks


def _install(
    site: FeatureSite, hooks: Hooks, controls: tuple[FeatureControl, ...], undo: ExitStack
) -> None:
    own: dict[str, Any] = vars(site.module)
    if "forward" in own:
        undo.callback(own.__setitem__, "forward", own["forward"])
    else:
        undo.callback(own.pop, "forward")
    # A bound method: the compiler then guards on its one function and compiles once for all runs.
    own["forward"] = _StandIn(site, site.module.forward, hooks, controls).forward


class _StandIn:
    """Runs a module's forward and hands over what it returns."""

    def __init__(
        self, site: FeatureSite, original: Any, hooks: Hooks, controls: tuple[FeatureControl, ...]
    ):
        self.site, self.original, self.hooks, self.controls = site, original, hooks, controls

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns, with the image's features as the controls want them."""
        returned = self.original(*args, **kwargs)
        if not isinstance(returned, tuple):
            return self._handed(returned)
        part = self.site.part
        return (*returned[:part], self._handed(returned[part]), *returned[part + 1 :])

    def _handed(self, value: Tensor) -> Tensor:
        current = self.hooks.current
        if current is None or len(current.rows) != len(value):
            return value
        call = FeatureCall(self.site, self.hooks.step, current.t, current.rows, current.latent)
        for control in self.controls:
            if control.active(call):
                value = control.output(call, value)
        return value
