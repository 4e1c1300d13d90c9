"""The attention proper, taken out of a processor's hands: its call of the fused kernel, caught.

A processor that calls `F.scaled_dot_product_attention` in its own code runs with a stand-in for the
name `F` among its globals, at no cost; for others PyTorch's override protocol
(`TorchFunctionMode`) finds the call, at some 5 us for every tensor operation of the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

Attend = Callable[..., Tensor]


class Runner:
    """Runs a layer's processor, whose attention somebody else computes.

    Args:
        original: the processor.

    Attributes:
        processor: what is run: it, or its twin on the fused kernel.
    """

    def __init__(self, original: Any):
        self.processor = _with_fused_kernel(original)
        self._direct = _attends_itself(type(self.processor).__call__)

    def run(self, attend: Attend, *args: Any, **kw: Any) -> Any:
        """Run it, with `attend` in place of `scaled_dot_product_attention`."""
        if self._direct:
            call = cast(FunctionType, type(self.processor).__call__)
            return _with_functional(call, attend)(self.processor, *args, **kw)
        with _Override(attend):
            return self.processor(*args, **kw)


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


def _with_functional(call: FunctionType, attend: Attend) -> FunctionType:
    """The same function, for which `F` attends by `attend`."""
    names = {**call.__globals__, "F": _Functional(attend)}
    twin = FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    twin.__kwdefaults__ = call.__kwdefaults__
    return twin


class _Functional:
    """torch.nn.functional, except for the attention."""

    def __init__(self, attend: Attend):
        self.scaled_dot_product_attention = attend

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


class _Override(TorchFunctionMode):
    """Finds the attention among all that is computed inside."""

    def __init__(self, attend: Attend):
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        return func(*args, **kwargs)
