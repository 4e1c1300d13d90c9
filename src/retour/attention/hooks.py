r"""Attention hooks: the only place in retour that touches attention processors.

A hooked layer runs *its own* processor, whatever that is, and only the attention proper,

.. math:: O = \operatorname{softmax}(s\,Q K^\top + m)\,V,

is taken out of its hands: we get its call to `scaled_dot_product_attention` together with the final
Q, K, V, scale and mask (:mod:`._capture` tells how). Projections, norms, rotary embeddings, masks,
residuals, the split of joint sequences, LoRA and adapters stay the processor's business. So one
hook serves UNet `Attention`, SD3 and FLUX alike, and a hooked network with nothing to do equals the
bare one bit for bit.

While a network call is in progress each control sees, in this order, `qkv`, `logits`, `probs` and
`output`; several controls fold in the order given, outer `hooked` contexts before inner ones. The
probabilities are computed explicitly (in float32 at least, autocast off) only where a control
overrides `logits` or `probs` and is `active`, unless its `needs_maps` says no; elsewhere the fused
kernel runs.

Only calls made through the hooked denoiser are controlled: an auxiliary call on the same network
(another denoiser's, a batch of other rows) passes untouched. A processor that attends more than
once (IP-Adapter) is controlled on its first attention, the text's.

Under `torch.compile` a hooked layer is a graph break and runs eagerly; the rest stays compiled. No
counter exists anywhere: the step comes from the loop, time and rows from the call in progress.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from ..core.branches import Denoiser
from ..core.model import AttentionSite
from ._processor import Processor
from ._tap import Hooks, tapped
from .control import AttentionCall, AttentionControl, Rotary, token_grid

__all__ = ["AttentionCall", "AttentionControl", "Hooks", "Rotary", "hooked", "token_grid"]


@contextmanager
def hooked(denoiser: Denoiser, controls: Sequence[AttentionControl]) -> Iterator[Hooks]:
    """Let `controls` take part in every attention of the denoiser's network calls.

    Layers that no control wants are left alone. On leaving, also by an exception, every layer gets
    back the very processor object it had. Contexts nest; the outer one's controls go first.

    Yields:
        The hooks, whose attribute `step` the loop keeps up to date.
    """
    with ExitStack() as undo:
        hooks = undo.enter_context(tapped(denoiser))
        for site in denoiser.model.attention_sites():
            chosen = tuple(c for c in controls if c.wants(site))
            if chosen:
                _install(site, hooks, chosen, undo)
        yield hooks


def _install(
    site: AttentionSite, hooks: Hooks, controls: tuple[AttentionControl, ...], undo: ExitStack
) -> None:
    module: Any = site.module
    current = module.processor
    undo.callback(module.set_processor, current)
    hooked_already = isinstance(current, Processor)
    original, outer = (current.original, current.parties) if hooked_already else (current, ())
    module.set_processor(Processor(site, original, (*outer, (hooks, controls))))
