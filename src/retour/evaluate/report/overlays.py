"""Attention overlays of a bench's outputs, drawn by `retour.explain`.

An output is inverted by DDIM with the prompt that tells the edit, and the map of the words that
differ is laid over it: where the model sees the new thing in this output. Where the target only
lacks words, it is where the model still sees what should be gone. The row of the input itself
shows the source's own words, for comparison. An overlay that is there already is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ...core.progress import bar
from ...errors import RetourError
from ...io import read_image, save_image
from .folder import REFERENCES, Bench
from .pictures import attention_path, in_turns
from .prompts import changed, compare, told_by

if TYPE_CHECKING:
    from PIL import Image

    from ...core.model import Model
    from ...heat import Panel

STEPS = 10
BATCH = 8


def draw(bench: Bench, count: int, model: Model | None = None) -> int:
    """Write `attention/LABEL/ITEM.png` for `count` items, taken in turns from each kind.

    Args:
        bench: what was run.
        count: items; all if there are fewer.
        model: what ran; None loads what the plan names.

    Returns:
        How many overlays were written.

    Raises:
        RetourError: the model is another one than ran, or does not attend to words.
    """
    if count < 1:
        raise RetourError(f"--overlays is {count}: choose a number of at least 1")
    bench.check_pictures()
    jobs = list(_jobs(bench, in_turns(bench.edits)[:count]))
    if not jobs:
        return 0
    live = _model(bench) if model is None else model
    if "attention" not in live.capabilities:
        raise RetourError(f"model {live.name!r} does not attend to words: leave out --overlays")
    batches = [jobs[start : start + BATCH] for start in range(0, len(jobs), BATCH)]
    with bar(batches, len(batches), "attention") as progress:
        for batch in progress:
            _draw(bench, live, batch)
    return len(jobs)


def _jobs(bench: Bench, items: Sequence[int]) -> Iterator[tuple[int, int]]:
    for run, asked in enumerate(bench.runs):
        if asked.label in REFERENCES[1:]:
            continue
        for item in items:
            there = attention_path(bench, asked.label, bench.edits[item].id).is_file()
            if (run, item) in bench.images and not there:
                yield run, item


def _model(bench: Bench) -> Model:
    from ...models.load import load

    told = bench.plan.get("model")
    name = told.get("name") if isinstance(told, dict) else told
    if not isinstance(name, str):
        raise RetourError(f"the plan of '{bench.folder}' names no model: leave out --overlays")
    model = load(name)
    ran = told.get("fingerprint") if isinstance(told, dict) else bench.plan.get("fingerprint")
    if ran and ran != model.fingerprint:
        raise RetourError(
            f"model {name!r} is not the one that ran (its fingerprint is {model.fingerprint}, not "
            f"{ran}): leave out --overlays, or run the bench again"
        )
    return model


def _draw(bench: Bench, model: Model, batch: Sequence[tuple[int, int]]) -> None:
    from ... import explanation

    told = [_told(bench, run, item) for run, item in batch]
    pictures = [read_image(bench.images[place]) for place in batch]
    shown = explanation.explain(
        pictures, [prompt for prompt, _ in told], model=model, steps=STEPS, guidance=1.0
    )
    for panel in shown.panels:
        (run, item), (prompt, words) = batch[panel.image], told[panel.image]
        path = attention_path(bench, bench.runs[run].label, bench.edits[item].id)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(_overlay(panel, words), path, {"words": words, "prompt": prompt})


def _told(bench: Bench, run: int, item: int) -> tuple[str, list[str]]:
    edit = bench.edits[item]
    if bench.runs[run].reference:
        lost = changed(compare(edit.source, edit.target)[0])
        if lost:
            return edit.source, lost
    return told_by(edit.source, edit.target)


def _overlay(panel: Panel, words: Sequence[str]) -> Image.Image:
    """The sum of the maps of words; of all where the tokenizer knows none of them so."""
    wanted = {word.lower() for word in words}
    kept = [k for k, word in enumerate(panel.words) if word.lower() in wanted]
    maps = panel.maps[kept] if kept else panel.maps
    return replace(panel, words=("",), maps=maps.sum(0, keepdim=True)).overlay(0)
