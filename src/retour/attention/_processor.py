"""What stands in for a layer's processor while it is hooked: runs it, its attention controlled."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.model import AttentionSite
from ..errors import RetourError
from ._capture import Runner
from ._tap import Hooks
from .control import AttentionCall, AttentionControl, Rotary

Parties = tuple[tuple[Hooks, tuple[AttentionControl, ...]], ...]
Active = list[tuple[AttentionControl, AttentionCall]]

# Modules, or their processors, that put the text before the image in a joint sequence. Names are
# prefixes of class names of diffusers; everything else joins image first, as SD3 does.
_TEXT_FIRST = ("Flux", "AuraFlow", "CogVideoX", "Qwen", "Chroma", "Bria")


class Processor:
    """Stands in for a layer's processor: runs it, with the attention proper in our hands.

    Args:
        site: the layer.
        original: the layer's own processor.
        parties: who takes part, outer contexts first.
    """

    def __init__(self, site: AttentionSite, original: Any, parties: Parties):
        self.site, self.original, self.parties = site, original, parties
        self.runner = Runner(original)
        call = self.runner.processor.__call__
        self.names = list(inspect.signature(call).parameters)[2:]
        # diffusers passes only those keywords that the signature of `processor.__call__` names.
        vars(self)["__call__"] = call

    @torch.compiler.disable
    def __call__(self, attn: Any, hidden: Tensor, *args: Any, **kw: Any) -> Any:
        encoder = kw.get("encoder_hidden_states", args[0] if args else None)
        text = 0 if encoder is None else encoder.shape[1]
        if not self.active(len(hidden), self._tokens(hidden, text), text, attn.heads):
            return self.original(attn, hidden, *args, **kw)
        watch = _Watch(self, attn, text, self._rotary(args, kw))
        result = self.runner.run(watch.attend, attn, hidden, *args, **kw)
        if not watch.seen:
            raise RetourError(
                f"attention layer {self.site.name!r} uses {type(self.original).__name__}, which "
                "does not attend through scaled_dot_product_attention: give the model its default "
                "attention processors and backend"
            )
        return result

    def _rotary(self, args: Sequence[Any], kw: Mapping[str, Any]) -> Rotary | None:
        """The rotary embedding that the processor was given, by name or by place."""
        return (dict(zip(self.names, args, strict=False)) | dict(kw)).get("image_rotary_emb")

    def _tokens(self, hidden: Tensor, text: int) -> tuple[int, int]:
        """Numbers of queries and keys that the attention over `hidden` will have."""
        pixels = hidden.shape[1] if hidden.ndim == 3 else hidden.shape[-2] * hidden.shape[-1]
        if self.site.kind == "joint":
            return pixels + text, pixels + text
        return pixels, text if self.site.kind == "cross" else pixels

    def active(
        self,
        rows: int,
        tokens: tuple[int, int],
        text: int,
        heads: int,
        rotary: Rotary | None = None,
    ) -> Active:
        """Controls that take part in this call, each with its description of it.

        Args:
            rows: number of batch rows.
            tokens: numbers of queries and keys.
            text: number of text tokens, 0 if unknown.
            heads: number of heads.
            rotary: of queries and keys, if any.
        """
        found: Active = []
        for hooks, controls in self.parties:
            now = hooks.current
            if now is None or len(now.rows) != rows:
                continue
            image, words = self._slices(*tokens, text if text else now.text)
            call = AttentionCall(
                self.site, hooks.step, now.t, now.rows, image, words, now.latent, heads, rotary
            )
            found += [(c, call) for c in controls if c.active(call)]
        return found

    def _slices(self, queries: int, keys: int, text: int) -> tuple[slice, slice | None]:
        """Image and text among the tokens, as :class:`AttentionCall` has them."""
        if self.site.kind == "self":
            return slice(0, queries), None
        if self.site.kind == "cross":
            return slice(0, queries), slice(0, keys)
        if _text_first(self.site.module, self.original):
            return slice(text, queries), slice(0, text)
        return slice(0, queries - text), slice(queries - text, queries)


def _text_first(module: nn.Module, processor: Any) -> bool:
    names = (type(module).__name__, type(processor).__name__)
    return any(name.startswith(_TEXT_FIRST) for name in names)


class _Watch:
    """Hands the first attention computed to the controls."""

    def __init__(self, processor: Processor, layer: Any, text: int, rotary: Rotary | None):
        self.processor, self.text, self.rotary, self.seen = processor, text, rotary, False
        twin = processor.runner.processor is not processor.original
        # A processor of the old kind scales by what its layer says; its twin takes the default.
        self.forced = {"scale": layer.scale} if twin else {}

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `scaled_dot_product_attention`; after the first time, just that."""
        if self.seen:
            return F.scaled_dot_product_attention(*args, **kwargs)
        self.seen = True
        return self._attend(*args, **kwargs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any) -> Tensor:
        names = ("attn_mask", "dropout_p", "is_causal")
        settings = dict(zip(names, args, strict=False)) | kw | self.forced
        tokens = (query.shape[-2], key.shape[-2])
        active = self.processor.active(len(query), tokens, self.text, query.shape[1], self.rotary)
        for control, call in active:
            query, key, value = control.qkv(call, query, key, value)
        if any(control.needs_maps(call) for control, call in active):
            with torch.autocast(query.device.type, enabled=False):
                out = _explicit(active, query, key, value, **settings)
        else:
            out = F.scaled_dot_product_attention(query, key, value, **settings)
        for control, call in active:
            out = control.output(call, out)
        return out


def _explicit(
    active: Active,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention with its maps in sight: what the fused kernel computes, in float32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = q.to(wide) @ k.to(wide).transpose(-1, -2) * scale
    if is_causal:
        attn_mask = torch.ones_like(logits[0, 0], dtype=torch.bool).tril()
    if attn_mask is not None:
        logits = _masked(logits, attn_mask)
    for control, call in active:
        logits = control.logits(call, logits)
    probs = logits.softmax(-1)
    for control, call in active:
        probs = control.probs(call, probs)
    if dropout_p:
        probs = F.dropout(probs, dropout_p)
    return (probs @ v.to(wide)).to(v.dtype)


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, -torch.inf)
    return logits + mask.to(logits.dtype)
