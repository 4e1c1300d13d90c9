"""What a benchmark will run: pairs of inverter and editor, checked before any work.

A run is one inverter with one editor at one number of steps. Two further rows need no run and are
always there: `copy-input`, the input itself, and `vae-ceiling`, the input encoded and decoded,
which is the best that an edit in latent space can do for the background.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..api import refuse_impossible, usual_inverter
from ..core.cache import content_hash
from ..core.model import Model
from ..core.registry import Entry, build_options, get
from ..errors import RetourError, check_range

COPY, CEILING = "copy-input", "vae-ceiling"
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0


@dataclass(frozen=True)
class Run:
    """One row of the benchmark.

    Attributes:
        label: its name, a safe file name.
        inverter: registered name; "" for a row that needs no run.
        inverter_options: those that were given, parsed.
        editor: registered name; "" for a row that needs no run.
        editor_options: those that were given, parsed.
        steps: steps of the grid.
        guidance: guidance scale.
        masked: whether the editor is given the cases' masks, because it needs one.
    """

    label: str
    inverter: str = ""
    inverter_options: Mapping[str, Any] = field(default_factory=dict)
    editor: str = ""
    editor_options: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    guidance: float | None = None
    masked: bool = False

    @property
    def ascent(self) -> str:
        """Equal for runs that can share their inversions."""
        if not self.inverter:
            return ""
        options = dict(self.inverter_options)
        return content_hash([self.inverter, options, self.steps, self.guidance])


PLAIN = (Run(COPY), Run(CEILING))


@dataclass(frozen=True)
class Task:
    """Unit of work: one batch, with all runs that share its inversion.

    Attributes:
        batch: number of the batch.
        items: ids of its cases.
        runs: the runs; the first one pays for the inversion.
    """

    batch: int
    items: tuple[str, ...]
    runs: tuple[Run, ...]


def names(text: str | Iterable[str] | None) -> list[str]:
    """Names of a list, or of a text with commas between, each once."""
    if text is None:
        return []
    given = text.split(",") if isinstance(text, str) else list(text)
    return list(dict.fromkeys(name.strip() for name in given if name.strip()))


def choose_pairs(
    inverters: str | Iterable[str] | None,
    editors: str | Iterable[str] | None,
    pairs: str | Iterable[str] | None = None,
) -> list[tuple[str, str]]:
    """(inverter, editor) of what was asked, each once; "" stands for the editor's own inverter.

    Args:
        inverters: each is run with each editor; none: every editor with its own.
        editors: see `inverters`.
        pairs: further ones, `inverter+editor` or an editor alone.

    Raises:
        RetourError: an unknown name, or nothing to run.
    """
    up, down = names(inverters), names(editors)
    if up and not down:
        raise RetourError(
            f"inverters {', '.join(up)} come without an editor: give editors, such as p2p"
        )
    chosen = [(inverter, editor) for editor in down for inverter in up or [""]]
    for pair in names(pairs):
        inverter, sign, editor = pair.partition("+")
        chosen.append((inverter.strip(), editor.strip()) if sign else ("", inverter))
    if not chosen:
        raise RetourError("there is nothing to run: give inverters and editors, or pairs")
    for inverter, editor in chosen:
        get("edit", editor)
        if inverter:
            get("invert", inverter)
    return list(dict.fromkeys(chosen))


def check_grid(steps: Sequence[int], guidance: float | None) -> None:
    """Refuse steps and guidance that no run takes."""
    if not steps:
        raise RetourError("there is no number of steps: give at least one")
    for count in steps:
        if isinstance(count, bool) or not isinstance(count, int):
            raise RetourError(f"steps is {count!r}: choose whole numbers")
        check_range("steps", count, 1, MAX_STEPS)
    if guidance is not None:
        check_range("guidance", guidance, 0, MAX_GUIDANCE)


def make_runs(
    model: Model,
    pairs: Sequence[tuple[str, str]],
    steps: Sequence[int],
    guidance: float,
    inverter_options: Mapping[str, Any] | None = None,
    editor_options: Mapping[str, Any] | None = None,
) -> list[Run]:
    """The runs of a grid, those of one inverter together.

    Args:
        model: must serve every method.
        pairs: from `choose_pairs`.
        steps: every pair is run with each; the label names it where there are several.
        guidance: of all runs.
        inverter_options: for every inverter; a key `NAME.key` is for that one alone.
        editor_options: as `inverter_options`.

    Raises:
        RetourError: a pair, or an option of it, is impossible; the pair is named.
    """
    check_grid(steps, guidance)
    found = [(i or usual_inverter(e, model), e) for i, e in pairs]
    found = list(dict.fromkeys(found))
    _refuse_strangers(inverter_options, {i for i, _ in found}, "inverter")
    _refuse_strangers(editor_options, {e for _, e in found}, "editor")
    several = len(set(steps)) > 1
    runs = []
    for inverter, editor in found:
        run = make_run(
            model,
            inverter,
            editor,
            _options_of(inverter, inverter_options),
            _options_of(editor, editor_options),
            guidance=guidance,
        )
        for count in dict.fromkeys(steps):
            label = f"{run.label}-{count}" if several else run.label
            runs.append(replace(run, label=label, steps=count))
    return [run for group in grouped(runs) for run in group]


def make_run(
    model: Model,
    inverter: str,
    editor: str,
    inverter_options: Mapping[str, Any],
    editor_options: Mapping[str, Any],
    *,
    steps: int | None = None,
    guidance: float | None = None,
) -> Run:
    """One run, checked against the model and its two halves against each other."""
    label = f"{inverter}+{editor}"
    first, second = get("invert", inverter), get("edit", editor)
    try:
        first.make(**inverter_options)
        second.make(**editor_options)
        refuse_impossible(model, first, second)
    except RetourError as error:
        raise RetourError(f"the pair '{label}' cannot run: {error}") from None
    return Run(
        label=label,
        inverter=inverter,
        inverter_options=_parsed(first, inverter_options),
        editor=editor,
        editor_options=_parsed(second, editor_options),
        steps=model.default_steps if steps is None else steps,
        guidance=model.default_guidance if guidance is None else float(guidance),
        masked=bool(second.facts.get("mask")),
    )


def grouped(runs: Sequence[Run]) -> list[tuple[Run, ...]]:
    """Runs that share their inversions together."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.ascent, []).append(run)
    return [tuple(group) for group in groups.values()]


def make_tasks(batches: Sequence[Sequence[str]], runs: Sequence[Run]) -> list[Task]:
    """Every batch with every group of runs; batch by batch, so that all meet the same machine."""
    groups = grouped(runs)
    return [Task(k, tuple(ids), group) for k, ids in enumerate(batches) for group in groups]


def _parsed(entry: Entry, given: Mapping[str, Any]) -> dict[str, Any]:
    options = build_options(entry, given)
    return {name: getattr(options, name) for name in given}


def _options_of(method: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    for key, value in ({} if options is None else options).items():
        name, dot, rest = key.partition(".")
        if not dot:
            chosen.setdefault(key, value)
        elif _same(name, method):
            chosen[rest] = value
    return chosen


def _refuse_strangers(options: Mapping[str, Any] | None, known: set[str], kind: str) -> None:
    for key in {} if options is None else options:
        name, dot, _ = key.partition(".")
        if dot and not any(_same(name, method) for method in known):
            raise RetourError(
                f"option {key!r} is for {kind} {name!r}, which is not run: "
                f"name one of {', '.join(sorted(known))}"
            )


def _same(name: str, method: str) -> bool:
    """Whether an option's prefix names a method; the command line has made dashes underscores."""
    return name.replace("-", "_") == method.replace("-", "_")
