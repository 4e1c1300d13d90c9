"""The metrics of a benchmark, measured batch by batch; see :mod:`.metrics`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from PIL import Image

from .cases import Case
from .metrics import Backbones, Convention, Metric, Sample, make_metrics


@dataclass(frozen=True)
class Meter:
    """Some of the metrics, ready to measure.

    Attributes:
        chosen: names of columns; None takes all that there are weights for.
        convention: "strict" or "pie_compat".
        backbones: networks of the metrics.
    """

    chosen: tuple[str, ...] | None = None
    convention: Convention = "strict"
    backbones: Backbones = field(default_factory=Backbones)

    def __post_init__(self) -> None:
        # A name that is unknown is refused here, not at the first batch.
        self._metrics  # noqa: B018

    @cached_property
    def _metrics(self) -> dict[str, Metric]:
        return make_metrics(self.chosen, self.convention, self.backbones)

    @property
    def needs_ceiling(self) -> bool:
        """Whether a metric compares with what the model's encoder and decoder lose."""
        return "background_exact" in self._metrics

    @property
    def names(self) -> tuple[str, ...]:
        """Columns, in order."""
        return tuple(self._metrics)

    def facts(self) -> dict[str, dict[str, str]]:
        """What each metric is: title, unit, which way is better, convention, backbone."""
        return {name: metric.describe() for name, metric in self._metrics.items()}

    def prepare(self) -> None:
        """Load the networks, so that missing weights are said before any work."""
        for metric in self._metrics.values():
            metric.prepare()

    def measure(
        self,
        cases: Sequence[Case],
        outputs: Sequence[Image.Image],
        ceilings: Sequence[Image.Image] | None = None,
    ) -> list[dict[str, float]]:
        """All metrics of each output at its input's size; NaN where one does not apply.

        Args:
            cases: what was edited.
            outputs: the edited images.
            ceilings: what the model's encoder and decoder make of the inputs, if it is known.
        """
        best = [None] * len(cases) if ceilings is None else ceilings
        samples = [_sample(*given) for given in zip(cases, outputs, best, strict=True)]
        columns: dict[str, list[float]] = {}
        for name, metric in self._metrics.items():
            columns[name] = metric.update(samples)
            metric.reset()
        return [{name: values[k] for name, values in columns.items()} for k in range(len(cases))]


def _sample(case: Case, output: Image.Image, ceiling: Image.Image | None) -> Sample:
    return Sample.make(
        case.image,
        output,
        mask=case.mask,
        truth=case.truth,
        ceiling=ceiling,
        prompt=case.target,
        source_prompt="" if case.source is None else case.source,
        kind=case.kind,
    )
