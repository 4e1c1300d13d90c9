"""How exactly does an exact inverter come back on the shipped networks?

    OMP_NUM_THREADS=1 python benchmarks/exactness.py [--inverter edict] [--models NAMES]
                                                     [--guidance 1,3,7.5] [--steps 50]

Error of the returned latents over the norm of the latents, of one picture of the paired set,
inverted with its caption and brought back, no edit; float32 network, float64 state. Prints the
Markdown table.
"""

from __future__ import annotations

import argparse

import retour
from retour.core.model import Model
from retour.core.progress import quiet
from retour.evaluate.suite import Suite


def error(model: Model, inverter: str, guidance: float, steps: int) -> float:
    """Of the round trip, relative."""
    item = Suite.paired().items[0]
    inversion = retour.invert(
        model, item.image, item.source, method=inverter, steps=steps, guidance=guidance
    )
    back = retour.reconstruct(inversion).latents
    return float((back - inversion.latents).norm() / inversion.latents.norm())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inverter", default="edict")
    parser.add_argument("--models", default="emoji-unet,emoji-mmdit", help="commas between")
    parser.add_argument("--guidance", default="1,3,7.5", help="scales, commas between")
    parser.add_argument("--steps", type=int, default=50)
    given = parser.parse_args()
    models = [retour.load(name) for name in given.models.split(",")]
    print("| guidance | " + " | ".join(model.name for model in models) + " |")
    print("| --- " * (len(models) + 1) + "|")
    with quiet():
        for scale in given.guidance.split(","):
            found = (error(m, given.inverter, float(scale), given.steps) for m in models)
            print(f"| {scale} | " + " | ".join(f"{e:.1e}" for e in found) + " |", flush=True)


if __name__ == "__main__":
    main()
