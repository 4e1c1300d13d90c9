"""What does the work of a benchmark: one model that takes tasks and gives pieces.

A piece is one run on one batch: its rows, with metrics and costs, and its pictures. The same worker
serves this machine's loop and a cluster's actors.

Costs are per image. The first run of a task pays for the inversion that the others share: `nfe` and
`seconds` are what this benchmark spent on a row, `nfe_full` and `seconds_full` what the row would
have cost alone. An inversion that was in the cache before costs nobody anything; one that this task
had made before it was killed does, so that figures do not tell how often a run was stopped. Peak
memory is that of inversion and edit, as if the row had been alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image

from .. import api
from ..captions import propose
from ..core.cache import InversionCache, inversion_inputs
from ..core.model import Model
from ..core.progress import quiet
from ..core.state import Inversion
from ..errors import RetourError
from ..io import fit, read_image
from .cases import Case
from .peak import Peak
from .plan import COPY, Run, Task
from .scores import Meter

TEXTS = ("run", "item", "kind", "split", "source", "target", "inverter", "editor", "image")
COUNTS = ("steps", "batch")
COSTS = (
    "nfe_inversion",
    "nfe_edit",
    "nfe",
    "nfe_full",
    "seconds_inversion",
    "seconds_edit",
    "seconds",
    "seconds_full",
    "peak_mib",
)
MEASURED = ("seconds_inversion", "seconds_edit", "seconds", "seconds_full", "peak_mib")


@dataclass(frozen=True)
class Piece:
    """One run on one batch, done.

    Attributes:
        batch: number of the batch.
        run: label of the run.
        rows: one for each case.
        images: the outputs, at the model's size.
        originals: the outputs at the inputs' sizes.
        record: facts of the run on this batch.
    """

    batch: int
    run: str
    rows: list[dict[str, Any]]
    images: list[Image.Image]
    originals: list[Image.Image]
    record: dict[str, Any]


@dataclass(frozen=True)
class Spent:
    """Costs per image; what a part did not do is 0."""

    nfe_inversion: float = 0.0
    nfe_edit: float = 0.0
    seconds_inversion: float = 0.0
    seconds_edit: float = 0.0
    peak_mib: float = math.nan


@dataclass
class Worker:
    """A model at work.

    Attributes:
        model: the model.
        meter: what is measured on each output.
        seed: seed of all noise.
        negative: negative prompt.
        cache: where inversions are kept; None keeps none.
        owner: id of the benchmark, which its inversions in the cache are marked with.
    """

    model: Model
    meter: Meter
    seed: int = 0
    negative: str = ""
    cache: InversionCache | None = None
    owner: str = ""
    _warm: bool = field(default=False, repr=False)
    _ceilings: tuple[int, list[Image.Image]] | None = field(default=None, repr=False)

    def pieces(self, task: Task, cases: Sequence[Case], todo: Sequence[str]) -> Iterator[Piece]:
        """Do the runs of a task whose labels are in `todo`, one after the other.

        Raises:
            RetourError: a method refused these pictures; the run and the pictures are named.
        """
        self._warm_up(cases[0])
        cases = self._told(cases)
        wanted = [run for run in task.runs if run.label in todo]
        if not task.runs[0].inverter:
            for run in wanted:
                yield self._plain(task, run, cases)
            return
        inversion, cost = self._ascend(task, cases)
        for run in wanted:
            paid = cost if run == task.runs[0] else Spent()
            yield self._edit(task, run, cases, inversion, paid)

    def _warm_up(self, case: Case) -> None:
        """The first calls allocate: that is nobody's time."""
        if not self._warm:
            self._through_codec([case])
            x = torch.zeros(1, *self.model.latent_shape(self.model.native, self.model.native))
            times = torch.full((1,), self.model.grid(2).times[1])
            with torch.no_grad():
                self.model.network(x, times, self.model.embed([""]))
            self._warm = True

    def _told(self, cases: Sequence[Case]) -> list[Case]:
        missing = [case.image for case in cases if case.source is None]
        guesses = iter(propose(missing) if missing else ())
        return [c if c.source is not None else replace(c, source=next(guesses)) for c in cases]

    def _plain(self, task: Task, run: Run, cases: Sequence[Case]) -> Piece:
        """The rows that need no run."""
        if run.label == COPY:
            pictures = [case.image for case in cases]
            return self._piece(task, run, cases, pictures, pictures, Spent(), {})
        with Peak(self.model.device) as peak:
            begun = time.perf_counter()
            images, originals = self._through_codec(cases)
            seconds = (time.perf_counter() - begun) / len(cases)
        cost = Spent(seconds_edit=seconds, peak_mib=peak.mib)
        return self._piece(task, run, cases, images, originals, cost, {})

    def _through_codec(self, cases: Sequence[Case]) -> tuple[list[Image.Image], list[Image.Image]]:
        model = self.model
        fitted = [
            fit(read_image(c.image), native=model.native, multiple=model.multiple) for c in cases
        ]
        images = api.decode(model, api.encode(model, [image for image, _ in fitted]))
        back = [place.restore(image) for image, (_, place) in zip(images, fitted, strict=True)]
        return images, back

    def _ceiling(self, task: Task, cases: Sequence[Case]) -> list[Image.Image] | None:
        """What encoding and decoding alone make of a batch; nobody's cost, made once for all."""
        if not self.meter.needs_ceiling:
            return None
        if self._ceilings is None or self._ceilings[0] != task.batch:
            self._ceilings = task.batch, self._through_codec(cases)[1]
        return self._ceilings[1]

    def _ascend(self, task: Task, cases: Sequence[Case]) -> tuple[Inversion, Spent]:
        """The inversion of a batch, and what it costs whoever pays for it."""
        run, owner = task.runs[0], f"{self.owner}/{task.batch}"
        images = [case.image for case in cases]
        prompts = [str(case.source) for case in cases]
        settings: dict[str, Any] = {
            "method": run.inverter,
            "steps": run.steps,
            "guidance": run.guidance,
            "negative": self.negative,
            "seed": self.seed,
            **run.inverter_options,
        }

        def make() -> Inversion:
            with Peak(self.model.device) as peak:
                made = api.invert(self.model, images, prompts, **settings)
            made.record |= {"owner": owner, "peak_mib": peak.mib}
            return made

        with _naming(run.inverter, task), quiet():
            if self.cache is None:
                inversion = make()
            else:
                inputs = inversion_inputs(self.model, images, prompts, **settings)
                inversion, _ = self.cache.fetch(inputs, make, self.model)
        record = inversion.record
        if record.get("owner") != owner:
            return inversion, Spent()
        seconds = record["seconds"] / len(cases)
        return inversion, Spent(record["nfe"], 0.0, seconds)

    def _edit(
        self, task: Task, run: Run, cases: Sequence[Case], inversion: Inversion, paid: Spent
    ) -> Piece:
        masks = [mask_image(case, run) for case in cases] if run.masked else None
        with _naming(run.label, task), quiet(), Peak(self.model.device) as peak:
            begun = time.perf_counter()
            result = api.edit(
                inversion,
                [case.target for case in cases],
                editor=run.editor,
                mask=masks,
                **run.editor_options,
            )
            seconds = (time.perf_counter() - begun) / len(cases)
        cost = replace(
            paid,
            nfe_edit=result.record["nfe_edit"],
            seconds_edit=seconds,
            peak_mib=_larger(float(inversion.record.get("peak_mib", math.nan)), peak.mib),
        )
        originals = [result.original_size(k) for k in range(len(cases))]
        return self._piece(task, run, cases, result.images, originals, cost, result.record)

    def _piece(
        self,
        task: Task,
        run: Run,
        cases: Sequence[Case],
        images: list[Image.Image],
        originals: list[Image.Image],
        cost: Spent,
        record: dict[str, Any],
    ) -> Piece:
        costs = cost_columns(cost, record, len(cases))
        metrics = self.meter.measure(cases, originals, self._ceiling(task, cases))
        rows = [
            {
                "run": run.label,
                "item": case.id,
                "kind": case.kind,
                "split": case.split,
                "source": case.source,
                "target": case.target,
                "inverter": run.inverter,
                "editor": run.editor,
                "steps": run.steps,
                "guidance": math.nan if run.guidance is None else run.guidance,
                "batch": len(cases),
                **measured,
                **costs,
                "image": f"images/{run.label}/{case.id}.png",
            }
            for case, measured in zip(cases, metrics, strict=True)
        ]
        return Piece(task.batch, run.label, rows, images, originals, record)


def cost_columns(cost: Spent, record: dict[str, Any], images: int) -> dict[str, float]:
    """The cost columns of a row, from what it spent and the record of its edit."""
    inversion = record.get("inversion", {})
    return {
        "nfe_inversion": cost.nfe_inversion,
        "nfe_edit": cost.nfe_edit,
        "nfe": cost.nfe_inversion + cost.nfe_edit,
        "nfe_full": inversion.get("nfe", 0.0) + cost.nfe_edit,
        "seconds_inversion": cost.seconds_inversion,
        "seconds_edit": cost.seconds_edit,
        "seconds": cost.seconds_inversion + cost.seconds_edit,
        "seconds_full": inversion.get("seconds", 0.0) / images + cost.seconds_edit,
        "peak_mib": cost.peak_mib,
    }


def mask_image(case: Case, run: Run | None = None) -> Image.Image:
    """A case's mask, white where an edit may change the picture."""
    if case.mask is None:
        needs = "" if run is None else f", which editor {run.editor!r} needs"
        raise RetourError(f"{case.id!r} has no mask{needs}: give one or choose another editor")
    return Image.fromarray(case.mask)


def _larger(a: float, b: float) -> float:
    return b if math.isnan(a) else a if math.isnan(b) else max(a, b)


class _naming:
    """Say in an error which run on which pictures it came from."""

    def __init__(self, label: str, task: Task):
        last = "" if len(task.items) == 1 else f" to {task.items[-1]}"
        self.where = f"{label} on {task.items[0]}{last}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RetourError):
            raise RetourError(f"{self.where}: {error}") from None
