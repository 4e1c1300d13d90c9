"""What a metric is: one column of the results, and the values it has seen.

A metric keeps its values, so that workers' metrics can be merged in any order with the same mean
to the last bit. It is plain data and goes through pickle: its networks, shared in `Backbones`, are
loaded where they are first used and stay behind when it is sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from ...errors import RetourError
from .backbones import Backbones
from .pixelwise import Convention, check_convention
from .sample import Sample


class Metric:
    """One column of the results: what it is, and the values it has seen.

    Args:
        convention: "strict" or "pie_compat"; metrics without a published quirk are always strict.
        backbones: networks, shared between metrics.

    Attributes:
        name: of the column.
        title: for people.
        unit: of the values as they stand in the column.
        better: which way.
        needs_truth: NaN without the true edited image.
        needs_mask: NaN without a mask.
        quirks: whether the conventions differ.
        backbone: name of the network behind it, "" without one; on the class, the default's.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    unit: ClassVar[str] = ""
    better: ClassVar[Literal["higher", "lower", "closer"]] = "higher"
    needs_truth: ClassVar[bool] = False
    needs_mask: ClassVar[bool] = False
    quirks: ClassVar[bool] = True
    backbone: str = ""

    def __init__(self, convention: Convention = "strict", backbones: Backbones | None = None):
        check_convention(convention)
        self.convention: Convention = convention if self.quirks else "strict"
        self.backbones = Backbones() if backbones is None else backbones
        self.values: list[float] = []

    def measure(self, samples: Sequence[Sample]) -> list[float]:
        """Values of samples to which the metric applies, in its unit; nothing is remembered."""
        raise NotImplementedError

    def applies(self, sample: Sample) -> bool:
        """Whether a sample has what the metric needs."""
        lacks_truth = self.needs_truth and sample.truth is None
        return not (lacks_truth or (self.needs_mask and sample.edited is None))

    def update(self, samples: Sequence[Sample]) -> list[float]:
        """Measure samples, remember the values and give them back, NaN where it does not apply."""
        fit = [sample for sample in samples if self.applies(sample)]
        found = iter(self.measure(fit) if fit else [])
        values = [next(found) if self.applies(sample) else math.nan for sample in samples]
        self.values += values
        return values

    def compute(self) -> float:
        """Mean of the values so far, NaN left out; NaN without any."""
        kept = [value for value in self.values if not math.isnan(value)]
        if not kept:
            return math.nan
        # Exactly rounded, so that the order of samples does not matter.
        return math.fsum(kept) / len(kept) if all(map(math.isfinite, kept)) else sum(kept)

    def reset(self) -> None:
        """Forget all values."""
        self.values = []

    def merge(self, *others: Metric) -> None:
        """Take in the values of other workers' metrics.

        Raises:
            RetourError: one of them measures something else.
        """
        for other in others:
            if other.describe() != self.describe():
                raise RetourError(
                    f"cannot merge {other.name} ({other.convention}, {other.backbone or 'no net'}) "
                    f"into {self.name} ({self.convention}, {self.backbone or 'no net'}): merge "
                    "what was measured alike."
                )
        for other in others:
            self.values += other.values

    def describe(self) -> dict[str, str]:
        """What readers of a results table must know of the column."""
        return {
            "title": self.title,
            "unit": self.unit,
            "better": self.better,
            "convention": self.convention,
            "backbone": self.backbone,
        }

    def prepare(self) -> None:
        """Load what will be needed, so that missing weights are said before any work."""

    @classmethod
    def usual(cls, backbones: Backbones) -> bool:
        """Whether it belongs to the metrics of a run that names none."""
        return True
