r"""What exactly invertible solvers share: the same question both ways, and a warning in time.

Asked the same again: on the way back a state differs by some :math:`10^{-15}` from what it was.
Cast to a float32 network's input, once in ten or so round trips one of its values falls to the
other side of a rounding edge (:math:`6\cdot 10^{-8}` apart), the network answers otherwise, and the
whole trip is off by :math:`10^{-7}`. So what the network is shown is first rounded to a few
significant bits: edges are then so rare that this does not happen, in either direction the same map
is walked, and 16 bits are far finer than what these networks resolve.

What moves a state must be affine in it, hence one of the network's faces is held as found there and
the other is read at the state itself: noise for networks that predict noise, flow velocity (finite
from pure noise to clean data) for all others.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.path import Path, Prediction, levels, predict
from ..core.solver import Denoise, kind_of
from ..errors import RetourError

GROWTH_LIMIT = 1e5
# Latents come from a float32 encoder: with edges halfway, as in usual rounding, one value in 256 of
# them would lie on an edge exactly, and rounding in the last place would push it over.
EDGE = (3 - math.sqrt(5)) / 2


class AmplificationWarning(UserWarning):
    """An exact scheme is asked for more steps than its rounding allows."""


def check_bits(bits: int | None) -> None:
    """Refuse an `input_bits` that would blur the picture.

    Raises:
        RetourError: fewer than 8 bits.
    """
    if bits is not None and bits < 8:
        raise RetourError(f"input_bits must be at least 8 or none, got {bits}")


def snap(x: Tensor, bits: int | None) -> Tensor:
    """Round to `bits` significant bits, with edges where no float32 number lies.

    For a gradient it is the identity: that of the rounding is 0 and would cut the network off.
    """
    if bits is None:
        return x
    mantissa, exponent = torch.frexp(x.detach())
    snapped = torch.ldexp(torch.floor(mantissa * 2**bits + EDGE), exponent - bits)
    return x + (snapped - x).detach() if x.requires_grad else snapped


def couples_noise(kind: str) -> bool:
    """Whether the face that is held is the noise (else it is the flow velocity)."""
    return kind in ("eps", "score")


def held(kind: str, prediction: Prediction) -> Tensor:
    """The face that is held: predicted noise, or velocity where the network predicts no noise."""
    return prediction.eps if couples_noise(kind) else prediction.velocity


def ask(denoise: Denoise, x: Tensor, t: float, path: Path, bits: int | None) -> Prediction:
    """Prediction at `(x, t)` by a network that is shown `x` rounded to `bits` bits."""
    if bits is None:
        return denoise(x, t)
    kind = kind_of(denoise)
    value = held(kind, denoise(snap(x, bits), t))
    return predict("eps" if couples_noise(kind) else "velocity", value, x, *levels(path, t, x))
