"""Errors that a user can act on: one sentence with the value given and the way out.

Importing this module loads nothing heavy: the command line answers a typing mistake at once.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any


class RetourError(ValueError):
    """Input that cannot be used; the message says what was given and what to do instead."""

    exit_code = 2


def unknown(kind: str, name: object, choices: Iterable[str], known_as: str = "") -> RetourError:
    """Make the error for a name that is not among the choices, with the nearest ones first.

    `known_as` says what else has that name, such as "an inverter".

    Returns the error, so that the caller's `raise` shows where the flow ends.
    """
    known = sorted(choices)
    plain = {choice.lower(): choice for choice in known}
    near = [plain[n] for n in difflib.get_close_matches(str(name).lower(), plain, n=3)]
    guess = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    if known_as:
        guess = f"it is {known_as}. "
    listed = ", ".join(known) if known else "there are none"
    return RetourError(f"unknown {kind} {str(name)!r}: {guess}Choices: {listed}.")


def quote(text: str, most: int = 80) -> str:
    """A text in quotation marks, its middle left out where it is long."""
    if len(text) <= most:
        return repr(text)
    half = (most - 5) // 2
    return repr(f"{text[:half].rstrip()} ... {text[-half:].lstrip()}")


def check_seed(name: str, seed: Any) -> int:
    """Refuse what is no seed of a random generator; return it.

    Raises:
        RetourError: with the value and the limits.
    """
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise RetourError(f"{name} is {seed!r}: choose a whole number.")
    if not -(2**63) <= seed < 2**63:
        raise RetourError(f"{name} is {seed}: choose a whole number below 2^63.")
    return int(seed)


def check_finite(values: Any, what: str, hint: str = "") -> None:
    """Refuse NaN and infinite values.

    Args:
        values: a torch tensor or anything NumPy reads as an array of numbers, of any shape.
        what: plural noun that opens the message, such as "the latents".
        hint: the way out, such as "try a smaller guidance".

    Raises:
        RetourError: with the number of bad values.
    """
    bad, total = _count_not_finite(values)
    if bad:
        way_out = f": {hint}" if hint else ""
        raise RetourError(f"{what} hold {bad:,} NaN or infinite of {total:,} values{way_out}.")


def check_range(name: str, value: Any, low: float | None = None, high: float | None = None) -> None:
    """Refuse a number outside of [low, high]; None leaves that side open, NaN is always refused.

    Raises:
        RetourError: with the value and the limits.
    """
    wanted = _describe_range(low, high)
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise RetourError(f"{name} is {value!r}: choose {wanted}.")
    number = float(value)
    too_low = low is not None and number < low
    too_high = high is not None and number > high
    if math.isnan(number) or too_low or too_high:
        raise RetourError(f"{name} is {value}: choose {wanted}.")


def _count_not_finite(values: Any) -> tuple[int, int]:
    # A tensor answers for itself, on its own device; everything else goes through NumPy.
    if hasattr(values, "isfinite"):
        finite = values.isfinite()
        return int((~finite).sum()), finite.numel()
    import numpy

    finite = numpy.isfinite(numpy.asarray(values))
    return int((~finite).sum()), finite.size


def _describe_range(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return "a number"
    if low is None:
        return f"a number of at most {high:g}"
    if high is None:
        return f"a number of at least {low:g}"
    return f"a number from {low:g} to {high:g}"
