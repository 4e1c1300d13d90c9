"""Images per second of invert + edit, by batch size.

    python benchmarks/batch.py [--model emoji-unet] [--batch 1,4,16] [--inverter direct]
                               [--editor p2p] [--steps N] [--images 16] [--out FILE.json]

Each batch size edits the same images; sizes take turns over the repeats, and the median counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import retour
from retour import api
from retour.core.model import Model
from retour.core.progress import quiet
from retour.evaluate.suite import Item, Suite
from retour.io import save_json
from retour.record import peak_memory, versions


def seconds(model: Model, items: Sequence[Item], batch: int, given: argparse.Namespace) -> float:
    """Time to edit all items in batches of one size."""
    begun = time.perf_counter()
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        inversion = api.invert(
            model,
            [i.image for i in part],
            [i.source for i in part],
            method=given.inverter,
            steps=given.steps,
        )
        api.edit(inversion, [i.target for i in part], editor=given.editor)
    return time.perf_counter() - begun


def table(rates: Mapping[int, float]) -> str:
    """Markdown: images per second of each size, and over the first one."""
    first = next(iter(rates))
    lines = [f"| batch | images per second | over batch {first} |", "| --- | --- | --- |"]
    lines += [f"| {k} | {rate:.2f} | {rate / rates[first]:.2f} |" for k, rate in rates.items()]
    return "\n".join(lines)


def options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji-unet")
    parser.add_argument("--batch", default="1,4,16", help="sizes, with commas between")
    parser.add_argument("--inverter", default="direct")
    parser.add_argument("--editor", default="p2p")
    parser.add_argument("--steps", type=int, help="the model's by default")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    given = options()
    model = retour.load(given.model)
    items = Suite.paired().select(limit=given.images).items
    sizes = [int(size) for size in given.batch.split(",")]
    with quiet():
        seconds(model, items[:1], 1, given)
        times = [
            {size: seconds(model, items, size, given) for size in sizes}
            for _ in range(given.repeats)
        ]
    rates = {size: len(items) / median(t[size] for t in times) for size in sizes}
    print(f"{model.name} on {model.device}: {given.inverter} + {given.editor}, {len(items)} images")
    print(table(rates))
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        facts = {"model": model.name, "images_per_second": rates, "seconds": times}
        save_json({**facts, "peak_memory": peak_memory(model), "versions": versions()}, given.out)


if __name__ == "__main__":
    main()
