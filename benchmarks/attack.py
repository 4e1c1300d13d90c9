"""How does a classifier hold? SCA on pictures whose class is known, with its own ablations.

    python benchmarks/attack.py [--model emoji-unet] [--classifier emoji-cnn] [--limit 32]
                                [--radii 0.05,0.1,0.2] [--radius 0.1] [--minutes 30]
                                [--batch 4] [--out DIR]

Pictures are those of the paired set that show one object of a class, and that the classifier gets
right. Variants, all with the same loop, steps and pictures:

- "SCA": noise maps of SDE-DPM-Solver++, the picture's caption; the attack's defaults
- "SCA, no caption": the empty prompt
- "DDIM latents": the same caption on the latents of a DDIM inversion
- "SCA, held": with the square error to the input in the aim, and half the step
- "gradient skipped": the paper's shortcut, the rest as "SCA"
- "paper's settings": the shortcut from the noisy end, guidance 4.5, a box that is not scaled

Printed: how often the classifier errs by radius (0: on the reconstruction) and by iterations; then,
at one radius, how often it and the others err, how far the pictures are from the inputs (PSNR;
structure distance; cosines of the tiny CLIP with the input and with the caption), and the paired
differences of SCA to the others, over all pictures and over those with which both succeed. All with
95 % intervals. A sheet shows inputs, pictures and differences.

Writes `attack.json` (all of it), `attack.csv` (every picture) and `attack.png`.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

import retour
from retour.core.model import Model
from retour.core.progress import quiet
from retour.data.palette import OBJECT_COLOURS
from retour.data.scenes import STYLE_PHRASES
from retour.evaluate.stats import Interval, mean_interval, paired_difference
from retour.evaluate.suite import Item, Suite
from retour.io import atomic_write, plain, save_image, save_json
from retour.privacy import Classifier, load_classifier
from retour.privacy.classifiers import predictions, stacked
from retour.privacy.distances import distances
from retour.privacy.run import Attack
from retour.record import versions

FULL, EMPTY, DDIM = "SCA", "SCA, no caption", "DDIM latents"
HELD, SKIPPED, PAPER = "SCA, held", "gradient skipped", "paper's settings"
VARIANTS: dict[str, dict[str, Any]] = {
    FULL: {},
    # Where both halves of the guidance are the empty prompt, its scale only changes the cost.
    EMPTY: {"prompt": "", "guidance": 1.0},
    DDIM: {"inverter": "ddim"},
    HELD: {"mse_weight": 20.0, "step_size": 0.02},
    SKIPPED: {"gradient": "skip"},
    PAPER: {
        "gradient": "skip",
        "strength": 1.0,
        "guidance": 4.5,
        "reference": None,
        "keep": "latest",
    },
}
OTHERS = tuple(name for name in VARIANTS if name != FULL)
TURNS = (0, 1, 2, 5, 10)
MEASURES = {
    "success": "errs",
    "transfer": "others err",
    "clean": "errs unchanged",
    "psnr": "PSNR",
    "structure": "structure x1e3",
    "clip_image": "cos image",
    "clip_caption": "cos caption",
}
SCALE = {"structure": 1e3}
# Of the Markdown table: head, factor, decimals.
COLUMNS = {
    "success": ("errs", 1, 2),
    "transfer": ("`{other}` errs", 1, 2),
    "psnr": ("PSNR, dB", 1, 1),
    "structure": ("structure x 1000", 1e3, 1),
    "clip_image": ("cosine with the picture", 1, 3),
    "clip_caption": ("with the caption", 1, 3),
}
CELL = 128


@dataclass(frozen=True)
class Shown:
    """A picture and what it shows."""

    item: Item
    label: str


@dataclass(frozen=True)
class Measure:
    """One attacked picture. `trace` is the margin at every iteration, unchanged first."""

    variant: str
    radius: float
    item: str
    label: str
    success: float
    transfer: float
    clean: float
    psnr: float
    structure: float
    clip_image: float
    clip_caption: float
    nfe: float
    seconds: float
    trace: tuple[float, ...]

    def errs_within(self, turns: int) -> float:
        """Whether a search of that many iterations would have succeeded."""
        return float(max(self.trace[: turns + 1]) > 0)


def labelled(items: Sequence[Item], labels: Sequence[str]) -> Iterator[Shown]:
    """The items whose prompt names one object, which is a class."""
    styles, colours = "|".join(STYLE_PHRASES.values()), "|".join(OBJECT_COLOURS)
    nouns = "|".join(map(re.escape, labels))
    words = rf"(?:{styles}) an? (?:(?:small|large) )?(?:(?:{colours}) )?({nouns})"
    pattern = re.compile(rf"{words}(?: in the [a-z ]+)? on an? [a-z ]+ background")
    for item in items:
        found = pattern.fullmatch(item.source)
        if found:
            yield Shown(item, found[1])


def told_right(shown: Sequence[Shown], judge: Classifier) -> list[Shown]:
    """The pictures that the classifier gets right as they are."""
    said = predictions(judge, stacked([s.item.image for s in shown]))
    return [s for s, answer in zip(shown, said, strict=True) if answer["label"] == s.label]


def measure(
    model: Model, shown: Sequence[Shown], variant: str, radius: float, **options: Any
) -> tuple[list[Measure], Attack]:
    """Attack a batch."""
    begun = time.perf_counter()
    given = {"prompt": [s.item.source for s in shown], **VARIANTS[variant], **options}
    result = retour.attack(
        model, [s.item.image for s in shown], [s.label for s in shown], radius=radius, **given
    )
    seconds = (time.perf_counter() - begun) / len(shown)
    captions = _caption_cosines(result, shown)
    kept = ("psnr", "structure", "clip_image")
    assert result.found is not None
    traces = result.found.trace.T.tolist()
    return [
        Measure(
            variant,
            radius,
            s.item.id,
            s.label,
            float(found["success"]),
            _transfer(found, result.record["classifier"], s.label),
            float(found["margins"]["reconstruction"] > 0),
            **{k: found["distances"]["adversarial"][k] for k in kept},
            clip_caption=cosine,
            nfe=result.record["nfe"],
            seconds=seconds,
            trace=tuple(trace),
        )
        for s, found, trace, cosine in zip(
            shown, result.record["results"], traces, captions, strict=True
        )
    ], result


def _transfer(found: dict[str, Any], surrogate: str, label: str) -> float:
    said = found["predictions"]["adversarial"]
    others = [answer["label"] != label for name, answer in said.items() if name != surrogate]
    return float(np.mean(others)) if others else float("nan")


def _caption_cosines(result: Attack, shown: Sequence[Shown]) -> list[float]:
    """With the true caption, also where the attack went without one."""
    images = [s.item.image for s in shown]
    return distances(result.images, images, [s.item.source for s in shown])["clip_caption"]


def run_all(
    model: Model,
    shown: Sequence[Shown],
    plan: Sequence[tuple[str, float]],
    batch: int,
    minutes: float = math.inf,
    **how: Any,
) -> tuple[list[Measure], dict[tuple[str, float], list[Attack]]]:
    """Every variant and radius of the plan on all pictures; they take turns.

    No batch but the first begins that would not end within `minutes`.
    """
    measures, results = [], {key: [] for key in plan}
    begun = time.monotonic()
    groups = [shown[k : k + batch] for k in range(0, len(shown), batch)]
    for number, group in enumerate(tqdm(groups, desc="batches")):
        if number and (time.monotonic() - begun) * (number + 1) > 60 * minutes * number:
            break
        for key in plan:
            some, result = measure(model, group, *key, **how)
            measures += some
            results[key].append(result)
    return measures, results


def pick(measures: Sequence[Measure], variant: str, radius: float) -> list[Measure]:
    """The measures of one variant at one radius, in the pictures' order."""
    return [m for m in measures if (m.variant, m.radius) == (variant, radius)]


def by_radius(measures: Sequence[Measure], variant: str) -> dict[str, Interval]:
    """Share of errors by radius; 0 is the reconstruction."""
    radii = sorted({m.radius for m in measures if m.variant == variant})
    rows = {"0": [m.clean for m in pick(measures, variant, radii[0])]}
    rows |= {f"{r:g}": [m.success for m in pick(measures, variant, r)] for r in radii}
    return {radius: mean_interval(values) for radius, values in rows.items()}


def by_turns(measures: Sequence[Measure], variant: str, radius: float) -> dict[str, Interval]:
    """Share of errors by iterations: each search holds the shorter ones."""
    some = pick(measures, variant, radius)
    counts = [n for n in TURNS if n < len(some[0].trace)]
    return {str(n): mean_interval([m.errs_within(n) for m in some]) for n in counts}


def summary(measures: Sequence[Measure], variant: str, radius: float) -> dict[str, Interval]:
    """Means at one radius."""
    some = pick(measures, variant, radius)
    return {k: mean_interval([getattr(m, k) for m in some]) for k in MEASURES}


def difference(
    measures: Sequence[Measure], other: str, radius: float, *, both_err: bool = False
) -> dict[str, Interval]:
    """SCA minus another variant, picture by picture: of all, or of those that both succeed with."""
    pairs = zip(pick(measures, FULL, radius), pick(measures, other, radius), strict=True)
    kept = [(a, b) for a, b in pairs if not both_err or (a.success and b.success)]
    return {
        k: paired_difference([getattr(a, k) for a, _ in kept], [getattr(b, k) for _, b in kept])
        for k in MEASURES
    }


def table(title: str, rows: dict[str, dict[str, Interval]], heads: dict[str, str]) -> str:
    """Text table of means and intervals; a star marks an interval of a difference without 0."""
    lines = [f"{title:<24}" + "".join(f"{head:>24}" for head in heads.values())]
    for name, row in rows.items():
        cells = "".join(f"{_cell(row[k], SCALE.get(k, 1.0), ' - ' in name):>24}" for k in heads)
        lines.append(f"{name:<24}{cells}")
    return "\n".join(lines)


def _cell(value: Interval, factor: float, starred: bool) -> str:
    mean, low, high = (f"{v * factor:.3f}" for v in (value.mean, value.low, value.high))
    star = "*" if starred and value.apart else ""
    return f"{mean}{star} [{low}, {high}]"


def markdown(report: Mapping[str, Any], other: str) -> str:
    """Table of the variants; a star: the paired difference to SCA excludes zero."""
    heads = ["", *(head.format(other=other) for head, _, _ in COLUMNS.values()), "evaluations"]
    lines = ["| " + " | ".join(heads).lstrip() + " |", "| --- " * len(heads) + "|"]
    for name, row in report["means"].items():
        gaps = report["differences"].get(f"{FULL} - {name}", {})
        cells = [
            _short(row[key], factor, digits, key in gaps and gaps[key].apart)
            for key, (_, factor, digits) in COLUMNS.items()
        ]
        cells.append(f"{report['cost'][name]['nfe']:.0f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short(value: Interval, factor: float, digits: int, apart: bool) -> str:
    texts = [f"{v * factor:.{digits}f}" for v in (value.mean, value.low, value.high)]
    mean, low, high = (text.removeprefix("0") for text in texts)
    star = "*" if apart else ""
    return mean + star if low == high or math.isnan(value.low) else f"{mean}{star} [{low}, {high}]"


def sheet(results: Sequence[Attack], columns: int = 4, most: int = 16) -> Image.Image:
    """Reconstruction, adversarial picture and their difference x 4, picture by picture."""
    triples = [
        (before, after)
        for result in results
        for before, after in zip(result.reconstructions, result.images, strict=True)
    ][:most]
    rows = -(-len(triples) // columns)
    width, height = 3 * CELL + 8, CELL + 8
    page = Image.new("RGB", (columns * width, rows * height), "white")
    for k, (before, after) in enumerate(triples):
        gap = np.asarray(after, np.int16) - np.asarray(before, np.int16)
        third = Image.fromarray(np.clip(128 + 4 * gap, 0, 255).astype(np.uint8))
        for place, image in enumerate((before, after, third)):
            large = image.resize((CELL, CELL), Image.Resampling.NEAREST)
            page.paste(
                large, (k % columns * (3 * CELL + 8) + place * CELL, k // columns * (CELL + 8))
            )
    return page


def write_csv(measures: Sequence[Measure], path: Path) -> None:
    """One line per variant, radius and picture."""
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
    parser.add_argument("--classifier", default="emoji-cnn")
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--radii", default="0.05,0.1,0.2", help="of SCA alone")
    parser.add_argument("--radius", type=float, default=0.1, help="where variants are compared")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=math.inf, help="fewer pictures if need be")
    parser.add_argument("--out", type=Path, default=Path("runs/attack"))
    return parser.parse_args()


def main() -> None:
    """Run, print, write."""
    given = options()
    model, judge = retour.load(given.model), load_classifier(given.classifier)
    known = list(labelled(Suite.paired().items, judge.labels))
    shown = told_right(known, judge)[: given.limit]
    radii = sorted({float(r) for r in given.radii.split(",")} | {given.radius})
    plan = [(FULL, r) for r in radii] + [(name, given.radius) for name in OTHERS]
    how = {k: getattr(given, k) for k in ("iterations", "steps")}
    given.out.mkdir(parents=True, exist_ok=True)
    with quiet():
        measures, results = run_all(
            model, shown, plan, given.batch, given.minutes, classifier=judge, **how
        )
    shown = shown[: len(pick(measures, FULL, given.radius))]
    errors = by_radius(measures, FULL)
    turns = {name: by_turns(measures, name, given.radius) for name in VARIANTS}
    means = {name: summary(measures, name, given.radius) for name in VARIANTS}
    gaps = {f"{FULL} - {o}": difference(measures, o, given.radius) for o in OTHERS}
    equal = {
        name: found
        for name, other in zip(gaps, OTHERS, strict=True)
        if (found := difference(measures, other, given.radius, both_err=True))["psnr"].count > 1
    }
    report = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "classifier": judge.name,
        "pictures": len(shown),
        "told_right": [len(told_right(known, judge)), len(known)],
        "radius": given.radius,
        **how,
        "versions": versions(),
        "by_radius": errors,
        "by_iterations": turns,
        "means": means,
        "differences": gaps,
        "differences_where_both_err": equal,
        "cost": {
            name: {"nfe": some[0].nfe, "seconds": float(np.mean([m.seconds for m in some]))}
            for name in VARIANTS
            for some in [pick(measures, name, given.radius)]
        },
    }
    save_json(plain(report), given.out / "attack.json")
    write_csv(measures, given.out / "attack.csv")
    save_image(sheet(results[FULL, given.radius]), given.out / "attack.png")
    print(
        f"{len(shown)} pictures, {model.name} ({model.fingerprint}), {judge.name}; "
        f"{given.steps} steps, {given.iterations} iterations"
    )
    print(table("errs by radius", {FULL: errors}, {k: k for k in errors}))
    counts = {k: k for k in turns[FULL]}
    print(table(f"by iterations, at {given.radius:g}", turns, counts))
    print(table(f"mean, at {given.radius:g}", means, MEASURES))
    print(table("paired difference", gaps, MEASURES))
    print(table("the same, both err", equal, MEASURES))
    print(", ".join(f"{name}: {row['psnr'].count} pictures" for name, row in equal.items()))
    for name, cost in report["cost"].items():
        print(f"{name}: {cost['nfe']:.0f} evaluations, {cost['seconds']:.2f} s a picture")
    others = ", ".join(results[FULL, given.radius][0].record["victims"])
    print("\n" + markdown(report, others) + "\n")
    print(f"written to {given.out}/attack.json, attack.csv and attack.png")


if __name__ == "__main__":
    main()
