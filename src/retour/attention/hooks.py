r"""Attention hooks: the only place in retour that touches attention processors.

A hooked layer runs *its own* processor, whatever that is, and only the attention proper,

.. math:: O = \operatorname{softmax}(s\,Q K^\top + m)\,V,

is taken out of its hands: we get its call to `scaled_dot_product_attention` together with the final
Q, K, V, scale and mask. A processor that makes this call itself runs with a stand-in for the name
`F` among its globals, at no cost; for others PyTorch's override protocol (`TorchFunctionMode`)
finds the call, at some 5 us for every tensor operation of the layer. Projections, norms,
rotary embeddings, masks, residuals, the split of joint sequences, LoRA and adapters stay the
processor's business. So one hook serves UNet `Attention`, SD3 and FLUX alike, and a hooked network
with nothing to do equals the bare one bit for bit.

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

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..core.branches import Denoiser, Rows
from ..core.grid import Step
from ..core.model import AttentionSite, Condition, Model
from ..errors import RetourError

Rotary = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AttentionCall:
    """One attention being computed.

    Attributes:
        site: the layer.
        step: the interval being crossed; None outside of :func:`retour.core.loop.walk`.
        t: path time of the network call.
        rows: names of the R batch rows.
        image: the image tokens on the query axis; on the key axis too unless the site is ``cross``.
        text: the text tokens on the key axis; on the query axis too if the site is ``joint``;
            None if it is ``self``.
        latent: (height, width) of the latents given to the network.
        heads: number of heads.
        rotary: cosines and sines (tokens, d) of the rotary embedding that queries and keys carry
            already; None where positions are told otherwise.
    """

    site: AttentionSite
    step: Step | None
    t: float
    rows: Rows
    image: slice
    text: slice | None
    latent: tuple[int, int]
    heads: int
    rotary: Rotary | None = None

    @property
    def pixels(self) -> int:
        """Number of image tokens."""
        return int(self.image.stop - self.image.start)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the image tokens: h w of them, in the proportions of the latents."""
        return token_grid(self.pixels, *self.latent)

    @property
    def factor(self) -> int:
        """How much coarser this attention is than the latents, per edge: 2 is 32 of 64."""
        return round(math.sqrt(math.prod(self.latent) / self.pixels))

    def within(self, largest: float) -> bool:
        """Whether its edge is at most the fraction `largest` of the latents' edge.

        A transformer works at one resolution only, set by its patches: it is always within.
        """
        return self.site.place == "block" or self.factor * largest >= 1

    def image_to_text(self, maps: Tensor) -> Tensor:
        """Block of (..., queries, keys) maps in which image tokens look at text tokens."""
        if self.text is None:
            raise RetourError(f"attention layer {self.site.name!r} has no text tokens")
        return maps[..., self.image, self.text]

    def image_to_image(self, maps: Tensor) -> Tensor:
        """Block of (..., queries, keys) maps in which image tokens look at image tokens."""
        return maps[..., self.image, self.image]

    def with_block(self, maps: Tensor, block: Tensor, keys: slice) -> Tensor:
        """Return `maps` with the block (image queries, `keys`) replaced; out of place."""
        if block.shape == maps.shape:
            return block
        strip = maps[..., self.image, :]
        strip = torch.slice_scatter(strip, block, -1, keys.start, keys.stop)
        return torch.slice_scatter(maps, strip, -2, self.image.start, self.image.stop)


@lru_cache(maxsize=256)
def token_grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Factor `tokens` into (h, w) with a ratio as near as possible to `height : width`.

    Raises:
        RetourError: no factorisation comes within a factor 1.5 of that ratio.
    """

    def error(h: int) -> float:
        return abs(math.log(h / (tokens // h)) - math.log(height / width))

    h = min((k for k in range(1, tokens + 1) if tokens % k == 0), key=error)
    if error(h) > math.log(1.5):
        raise RetourError(f"{tokens} image tokens fit no grid shaped like {height} x {width}")
    return h, tokens // h


class AttentionControl:
    """Base of everything that reads or changes attention. Each method is a no-op by default.

    Tensors are returned, never edited in place, so that gradients flow through.
    """

    def wants(self, site: AttentionSite) -> bool:
        """Whether to hook that layer at all; asked once, before the run."""
        return True

    def active(self, call: AttentionCall) -> bool:
        """Whether to take part in this call; where nobody does, the bare attention runs."""
        return True

    def needs_maps(self, call: AttentionCall) -> bool:
        """Whether `logits` and `probs` matter in this call; if to nobody, the fused kernel runs."""
        base, cls = AttentionControl, type(self)
        return cls.logits is not base.logits or cls.probs is not base.probs

    def qkv(
        self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (R, heads, tokens, d) each."""
        return q, k, v

    def logits(self, call: AttentionCall, logits: Tensor) -> Tensor:
        """Scaled and masked scores (R, heads, queries, keys), float32 at least."""
        return logits

    def probs(self, call: AttentionCall, probs: Tensor) -> Tensor:
        """Attention probabilities (R, heads, queries, keys), float32 at least."""
        return probs

    def output(self, call: AttentionCall, out: Tensor) -> Tensor:
        """Attention output before the layer's out-projection, (R, heads, queries, d)."""
        return out


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
    """Handle of a :func:`hooked` context.

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

    def describe(
        self,
        site: AttentionSite,
        rows: int,
        tokens: tuple[int, int],
        text: int,
        heads: int,
        rotary: Rotary | None = None,
    ) -> AttentionCall | None:
        """Describe an attention of `rows` rows over `tokens` (queries, keys).

        `text` is the number of text tokens, 0 if unknown. None outside of a call.
        """
        call = self.current
        if call is None or len(call.rows) != rows:
            return None
        image, words = _token_slices(site, *tokens, text if text else call.text)
        return AttentionCall(
            site, self.step, call.t, call.rows, image, words, call.latent, heads, rotary
        )


def _text_tokens(condition: Condition) -> int:
    embeds = condition.tensors.get("embeds")
    return 0 if embeds is None else embeds.shape[1]


# Modules, or their processors, that put the text before the image in a joint sequence. Names are
# prefixes of class names of diffusers; everything else joins image first, as SD3 does.
_TEXT_FIRST = ("Flux", "AuraFlow", "CogVideoX", "Qwen", "Chroma", "Bria")


def _text_first(module: nn.Module) -> bool:
    names = (type(module).__name__, type(_bare(module.processor)).__name__)
    return any(name.startswith(_TEXT_FIRST) for name in names)


def _token_slices(
    site: AttentionSite, queries: int, keys: int, text: int
) -> tuple[slice, slice | None]:
    if site.kind == "self":
        return slice(0, queries), None
    if site.kind == "cross":
        return slice(0, queries), slice(0, keys)
    if _text_first(site.module):
        return slice(text, queries), slice(0, text)
    return slice(0, queries - text), slice(queries - text, queries)


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


Active = list[tuple[AttentionControl, AttentionCall]]


class _Processor:
    """Stands in for a layer's processor: runs it, with the attention proper in our hands."""

    def __init__(
        self,
        site: AttentionSite,
        original: Any,
        parties: tuple[tuple[Hooks, tuple[AttentionControl, ...]], ...],
    ):
        self.site, self.original, self.parties = site, original, parties
        self.runner = _with_fused_kernel(original)
        self.direct = _attends_itself(type(self.runner).__call__)
        self.names = list(inspect.signature(self.runner.__call__).parameters)[2:]
        # diffusers passes only those keywords that the signature of `processor.__call__` names.
        vars(self)["__call__"] = self.runner.__call__

    @torch.compiler.disable
    def __call__(self, attn: Any, hidden: Tensor, *args: Any, **kw: Any) -> Any:
        encoder = kw.get("encoder_hidden_states", args[0] if args else None)
        text = 0 if encoder is None else encoder.shape[1]
        if not self.active(len(hidden), self._tokens(hidden, text), text, attn.heads):
            return self.original(attn, hidden, *args, **kw)
        watch = _Watch(self, attn, text, self._rotary(args, kw))
        result = self._run(watch, attn, hidden, *args, **kw)
        if not watch.seen:
            raise RetourError(
                f"attention layer {self.site.name!r} uses {type(self.original).__name__}, which "
                "does not attend through scaled_dot_product_attention: give the model its default "
                "attention processors and backend"
            )
        return result

    def _run(self, watch: _Watch, *args: Any, **kw: Any) -> Any:
        """Run the layer's processor with its attention watched."""
        if self.direct:
            call = cast(FunctionType, type(self.runner).__call__)
            return _with_functional(call, watch)(self.runner, *args, **kw)
        with _Override(watch):
            return self.runner(*args, **kw)

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
        """Controls that take part in this call, each with its description of it."""
        found: Active = []
        for hooks, controls in self.parties:
            call = hooks.describe(self.site, rows, tokens, text, heads, rotary)
            if call is not None:
                found += [(c, call) for c in controls if c.active(call)]
        return found


def _bare(processor: Any) -> Any:
    return processor.original if isinstance(processor, _Processor) else processor


def _with_fused_kernel(processor: Any) -> Any:
    """Return the processor, or its twin on the fused kernel: same maths, different memory use."""
    from diffusers.models import attention_processor as known

    twins = {
        known.AttnProcessor: known.AttnProcessor2_0,
        known.SlicedAttnProcessor: known.AttnProcessor2_0,
        known.XFormersAttnProcessor: known.AttnProcessor2_0,
        known.XFormersJointAttnProcessor: known.JointAttnProcessor2_0,
    }
    twin = twins.get(type(processor))
    return processor if twin is None else twin()


def _attends_itself(call: Any) -> bool:
    """Whether a function calls `F.scaled_dot_product_attention` in its own code, and no other."""
    if not isinstance(call, FunctionType) or call.__globals__.get("F") is not F:
        return False
    names = set(call.__code__.co_names)
    return {"F", "scaled_dot_product_attention"} <= names and not names & {
        "dispatch_attention_fn",
        "super",
    }


def _with_functional(call: FunctionType, watch: _Watch) -> FunctionType:
    """The same function, for which `F` attends through the watch."""
    names = {**call.__globals__, "F": _Functional(watch)}
    twin = FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    twin.__kwdefaults__ = call.__kwdefaults__
    return twin


class _Functional:
    """torch.nn.functional, except for the attention."""

    def __init__(self, watch: _Watch):
        self.scaled_dot_product_attention = watch.attend

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


class _Override(TorchFunctionMode):
    """Finds the attention among all that is computed inside."""

    def __init__(self, watch: _Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is F.scaled_dot_product_attention:
            return self.watch.attend(*args, **kwargs)
        return func(*args, **kwargs)


class _Watch:
    """Hands the first attention computed to the controls."""

    def __init__(self, processor: _Processor, layer: Any, text: int, rotary: Rotary | None = None):
        self.processor, self.text, self.rotary, self.seen = processor, text, rotary, False
        twin = processor.runner is not processor.original
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


@contextmanager
def tapped(denoiser: Denoiser) -> Iterator[Hooks]:
    """Know which of the denoiser's network calls is in progress; contexts nest."""
    hooks, model = Hooks(denoiser), denoiser.model
    denoiser.model = cast(Model, _Tap(model, hooks))
    try:
        yield hooks
    finally:
        denoiser.model = model


def _install(
    site: AttentionSite, hooks: Hooks, controls: tuple[AttentionControl, ...], undo: ExitStack
) -> None:
    module: Any = site.module
    current = module.processor
    outer = current.parties if isinstance(current, _Processor) else ()
    undo.callback(module.set_processor, current)
    module.set_processor(_Processor(site, _bare(current), (*outer, (hooks, controls))))
