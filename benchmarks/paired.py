"""Compare inverters and editors on the paired set, where the true edited image is known.

    python benchmarks/paired.py [--model emoji-unet] [--inverters ddim,direct] [--editors p2p]
                                [--pairs virtual+infedit] [-E KEY=VALUE] [--limit N] [--batch 16]
                                [--guidance W] [--steps 20] [--suite FOLDER] [--out DIR]

What `retour bench` does, with the defaults of the tables in the docs and a folder of its own for
each set of arguments, so that none is refused and each goes on where it was stopped. Prints the
Markdown table; `retour report DIR` shows the rest.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from retour.core.cache import content_hash
from retour.evaluate.runner import bench


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
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
    parser.add_argument("--steps", type=int, default=20, help="of all methods")
    parser.add_argument("--metrics", help="names, with commas between; all by default")
    parser.add_argument(
        "--suite", default="paired", help="folder in PIE-Bench's format; else the paired set"
    )
    parser.add_argument("--border", action="store_true", help="PIE-Bench's border rule for masks")
    parser.add_argument("--out", type=Path, help="by default a folder in runs/paired")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and print."""
    given = vars(options(arguments))
    chosen = dict(option.split("=", 1) for option in given.pop("options"))
    out = given.pop("out")
    if out is None:
        out = Path("runs") / "paired" / content_hash([given, chosen])[:8]
    result = bench(out, **given, editor_options=chosen)
    print(result.heading())
    print(result.table())
    print(f"written to {result.folder}")


if __name__ == "__main__":
    main()
