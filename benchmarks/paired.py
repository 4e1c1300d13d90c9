"""Compare inverters and editors on the paired set, where the true edited image is known.

    python benchmarks/paired.py [--model emoji-unet] [--inverters ddim,direct] [--editors p2p]
                                [--pairs virtual+infedit] [-E KEY=VALUE] [--limit N] [--batch 16]
                                [--guidance W] [--steps N] [--suite FOLDER] [--out DIR]

Every inverter is run with every editor, and `--pairs` are run beside them. Pairs with the same
inverter share its inversions: its evaluations and seconds are counted in each, but spent once.

All methods get the same prompts, guidance and steps. Two rows come without any edit: "copy the
input", and "VAE ceiling", the input encoded and decoded, which is the best that an edit in
latent space can do for the background. Columns, means with
95 % intervals (costs without):

- PSNR of the background (pixels that the edit must leave alone), strict and as PIE-Bench counts
- structure distance x 1000 between input and output, with the substitute backbone that the
  header names
- distance x 1000 to the true edited image: mean square error inside the mask (0 is perfect)
- score: cosine of the output and the target prompt in the embedded CLIP, x 100 (higher is better)
- network evaluations and seconds per image

Writes `paired.json` (record, means, paired differences) and `paired.csv` (every item).
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

import retour
from retour import api
from retour.captions import captioner
from retour.core.model import Model
from retour.core.progress import quiet
from retour.core.state import Inversion
from retour.evaluate.metrics import EmojiClip, mse_inside, pixels, psnr
from retour.evaluate.stats import Interval, mean_interval, paired_difference
from retour.evaluate.suite import Item, Suite
from retour.io import atomic_write, plain, save_json
from retour.record import versions

COPY, CEILING = "copy the input", "VAE ceiling"


@dataclass(frozen=True)
class Measure:
    """One output, measured. `edit_mse` is NaN where the true edited image is unknown."""

    method: str
    item: str
    kind: str
    psnr_strict: float
    psnr_pie_compat: float
    structure: float
    edit_mse: float
    score: float
    nfe: float
    seconds: float


@dataclass(frozen=True)
class Column:
    """How a measure is shown: factor and decimals.

    A cost is the same for all items of a batch, so these are no sample: it has no interval.
    """

    field: str
    title: str
    factor: float = 1.0
    digits: int = 2
    cost: bool = False


COLUMNS = (
    Column("psnr_strict", "bg PSNR"),
    Column("psnr_pie_compat", "bg PSNR (pie)"),
    Column("structure", "structure x1e3", 1e3),
    Column("edit_mse", "true edit x1e3", 1e3),
    Column("score", "score x100", 1e2),
    Column("nfe", "NFE", digits=0, cost=True),
    Column("seconds", "s/image", digits=3, cost=True),
)


@dataclass(frozen=True)
class Outcome:
    """Output of a batch: pictures at the inputs' size, and the cost per image."""

    images: list[Image.Image]
    nfe: float = 0.0
    seconds: float = 0.0


Method = Callable[[Sequence[Item]], Outcome]


def copy(items: Sequence[Item]) -> Outcome:
    """The inputs themselves."""
    return Outcome([item.image for item in items])


def ceiling(model: Model) -> Method:
    """Encode and decode."""

    def run(items: Sequence[Item]) -> Outcome:
        begun = time.perf_counter()
        shape = {"native": model.native, "multiple": model.multiple}
        fitted = [retour.io.fit(item.image, **shape) for item in items]
        images = api.decode(model, api.encode(model, [image for image, _ in fitted]))
        back = [place.restore(image) for image, (_, place) in zip(images, fitted, strict=True)]
        return Outcome(back, 0.0, (time.perf_counter() - begun) / len(items))

    return run


class Inversions:
    """Inversions of the batch in hand, one for each inverter, shared by its editors."""

    def __init__(self, model: Model, guidance: float, steps: int | None):
        self.model, self.guidance, self.steps = model, guidance, steps
        self._batch: tuple[str, ...] = ()
        self._made: dict[str, Inversion] = {}

    def of(self, items: Sequence[Item], inverter: str) -> Inversion:
        """The inversion of a batch; only those of the last batch are kept."""
        batch = tuple(item.id for item in items)
        if batch != self._batch:
            self._batch, self._made = batch, {}
        if inverter not in self._made:
            self._made[inverter] = api.invert(
                self.model,
                [item.image for item in items],
                [item.source for item in items],
                method=inverter,
                steps=self.steps,
                guidance=self.guidance,
            )
        return self._made[inverter]


def method(
    inversions: Inversions,
    inverter: str,
    editor: str,
    options: Mapping[str, str] = MappingProxyType({}),
) -> Method:
    """Invert with one inverter and edit."""

    def run(items: Sequence[Item]) -> Outcome:
        inversion = inversions.of(items, inverter)
        begun = time.perf_counter()
        result = api.edit(inversion, [item.target for item in items], editor=editor, **options)
        images = [result.original_size(i) for i in range(len(items))]
        seconds = inversion.record["seconds"] + time.perf_counter() - begun
        return Outcome(images, result.record["nfe"], seconds / len(items))

    return run


def chosen_pairs(inverters: str, editors: str, pairs: str | None) -> list[tuple[str, str]]:
    """(inverter, editor) of the command line, each once."""
    crossed = [(i, e) for i in inverters.split(",") if i for e in editors.split(",") if e]
    named = [p.partition("+") for p in pairs.split(",")] if pairs else []
    return list(dict.fromkeys([*crossed, *((i, e) for i, _, e in named)]))


def batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Cut into batches."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def measure(name: str, items: Sequence[Item], outcome: Outcome, clip: EmojiClip) -> list[Measure]:
    """Compare a batch of outputs with its inputs and true edits."""
    sources = [pixels(item.image) for item in items]
    outputs = [pixels(image) for image in outcome.images]
    structure = [math.nan] * len(items)
    if clip.available:
        structure = clip.distance(torch.stack(sources), torch.stack(outputs)).tolist()
    return [
        Measure(
            method=name,
            item=item.id,
            kind=item.kind,
            psnr_strict=psnr(source, output, item.mask(), "strict"),
            psnr_pie_compat=psnr(source, output, item.mask(), "pie_compat"),
            structure=distance,
            edit_mse=_edit_error(item, output),
            score=score,
            nfe=outcome.nfe,
            seconds=outcome.seconds,
        )
        for item, source, output, distance, score in zip(
            items, sources, outputs, structure, scores(items, outcome), strict=True
        )
    ]


@torch.no_grad()
def scores(items: Sequence[Item], outcome: Outcome) -> list[float]:
    """Cosine of each output with its target prompt, in the embedded CLIP."""
    images = captioner().embed_images(outcome.images)
    return (images * captioner().embed_texts([item.target for item in items])).sum(1).tolist()


def _edit_error(item: Item, output: torch.Tensor) -> float:
    truth = item.edited
    return math.nan if truth is None else mse_inside(pixels(truth), output, item.mask())


def run_all(methods: dict[str, Method], suite: Suite, batch: int) -> list[Measure]:
    """Run every method on the whole set; they take turns, so that all meet the same machine."""
    clip, measures = EmojiClip(), []
    for items in tqdm(list(batches(suite.items, batch)), desc="batches"):
        for name, run in methods.items():
            measures += measure(name, items, run(items), clip)
    return measures


def values(measures: Sequence[Measure], name: str, field: str) -> list[float]:
    """One measure of one method, over the items in order."""
    return [getattr(m, field) for m in measures if m.method == name]


def means(measures: Sequence[Measure], names: Sequence[str]) -> dict[str, dict[str, Interval]]:
    """Method -> measure -> mean with interval."""
    return {
        name: {
            c.field: _stripped(c, mean_interval(values(measures, name, c.field))) for c in COLUMNS
        }
        for name in names
    }


def differences(
    measures: Sequence[Measure], names: Sequence[str]
) -> dict[str, dict[str, Interval]]:
    """ "a - b" -> measure -> mean paired difference with interval, for all pairs of methods."""
    return {
        f"{a} - {b}": {
            c.field: _stripped(
                c, paired_difference(values(measures, a, c.field), values(measures, b, c.field))
            )
            for c in COLUMNS
        }
        for a, b in combinations(names, 2)
    }


def _stripped(column: Column, value: Interval) -> Interval:
    return replace(value, low=math.nan, high=math.nan) if column.cost else value


def by_kind(measures: Sequence[Measure], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Kind of edit -> method -> measure -> mean with interval."""
    kinds = dict.fromkeys(m.kind for m in measures)
    return {k: means([m for m in measures if m.kind == k], names) for k in kinds}


def table(title: str, rows: dict[str, dict[str, Interval]], *, starred: bool = False) -> str:
    """Text table; `starred` marks the intervals that exclude zero."""
    lines = [f"{title:<28}" + "".join(f"{c.title:>26}" for c in COLUMNS)]
    for name, row in rows.items():
        cells = (_cell(row[c.field], c, starred) for c in COLUMNS)
        lines.append(f"{name:<28}" + "".join(f"{cell:>26}" for cell in cells))
    return "\n".join(lines)


def _cell(value: Interval, column: Column, starred: bool) -> str:
    if not value.count:
        return "-"
    mean, low, high = (f"{v * column.factor:.{column.digits}f}" for v in _ends(value))
    star = "*" if starred and value.apart else ""
    return mean + star if math.isnan(value.low) or low == high else f"{mean}{star} [{low}, {high}]"


def _ends(value: Interval) -> tuple[float, float, float]:
    return value.mean, value.low, value.high


def write_csv(measures: Sequence[Measure], path: Path) -> None:
    """One line per method and item."""
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Measure)])
        writer.writeheader()
        writer.writerows(asdict(m) for m in measures)


def options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji-unet")
    parser.add_argument("--inverters", default="ddim,direct", help="names, with commas between")
    parser.add_argument("--editors", default="p2p", help="names, with commas between")
    parser.add_argument("--pairs", help="further inverter+editor pairs, with commas between")
    parser.add_argument("-E", dest="options", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--limit", type=int, help="number of pairs, taken evenly from all kinds")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--guidance", type=float, help="of all methods; the model's by default")
    parser.add_argument("--steps", type=int, help="of all methods; the model's by default")
    parser.add_argument(
        "--suite", type=Path, help="folder in PIE-Bench's format; else the paired set"
    )
    parser.add_argument("--border", action="store_true", help="PIE-Bench's border rule for masks")
    parser.add_argument("--out", type=Path, default=Path("runs/paired"))
    return parser.parse_args()


def main() -> None:
    """Run, print, write."""
    given = options()
    model = retour.load(given.model)
    suite = Suite.paired() if given.suite is None else Suite.load(given.suite, border=given.border)
    suite = suite.select(limit=given.limit)
    guidance = model.default_guidance if given.guidance is None else given.guidance
    chosen = dict(option.split("=", 1) for option in given.options)
    inversions = Inversions(model, guidance, given.steps)
    pairs = {
        f"{inverter} + {editor}": method(inversions, inverter, editor, chosen)
        for inverter, editor in chosen_pairs(given.inverters, given.editors, given.pairs)
    }
    methods = {COPY: copy, CEILING: ceiling(model), **pairs}
    given.out.mkdir(parents=True, exist_ok=True)
    with quiet():
        # The first run allocates: it is nobody's time.
        next(iter(pairs.values()))(suite.items[:1])
        measures = run_all(methods, suite, given.batch)
    report = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "suite": suite.name,
        "items": len(suite),
        "pairs": list(pairs),
        "editor_options": given.options,
        "guidance": guidance,
        "steps": model.default_steps if given.steps is None else given.steps,
        "batch": given.batch,
        "structure_backbone": EmojiClip.name if EmojiClip().available else None,
        "versions": versions(),
        "means": means(measures, list(methods)),
        "differences": differences(measures, list(pairs)),
        "kinds": by_kind(measures, list(methods)),
    }
    save_json(plain(report), given.out / "paired.json")
    write_csv(measures, given.out / "paired.csv")
    print(
        f"{len(suite)} pairs of {suite.name!r}, {model.name} ({model.fingerprint}), "
        f"{' '.join(given.options)} {report['steps']} steps, guidance {guidance:g};"
        f" structure: {report['structure_backbone']}"
    )
    print(table("mean [95 %]", report["means"]))
    print(table("paired difference", report["differences"], starred=True))
    print(f"written to {given.out}/paired.json and paired.csv")


if __name__ == "__main__":
    main()
