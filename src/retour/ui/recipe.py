"""A recipe: everything that decides a picture, and the Python and the command that cook it again.

Runs are made *from* recipes, so what is shown to copy is what was run.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from ..core.registry import Entry, get
from ..errors import RetourError, check_range

MAX_STEPS = 250
MAX_PROMPT = 1000
MAX_DRAGS = 32
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Recipe:
    """What is asked for.

    Attributes:
        picture: name of the file that holds the picture.
        source: what it shows; None asks the caption proposer.
        target: what it shall show.
        model: an embedded name, a folder or a hub id.
        inverter: a registered inverter.
        editor: a registered editor.
        steps: steps of the time grid.
        guidance: guidance scale.
        seed: seed of all noise.
        inverter_options: options of the inverter that are not its defaults.
        editor_options: options of the editor that are not its defaults.
        mask: name of the file that holds the mask; None: no mask.
        drags: (x, y) of every handle and of its goal, in pixels of the picture.
        in_turn: a round for each drag, each from the last one's picture.
        device: where to run; None: wherever the model goes by itself.
        dtype: type of the weights; None: the model's own choice.
    """

    picture: str
    source: str | None
    target: str
    model: str
    inverter: str
    editor: str
    steps: int
    guidance: float
    seed: int = 0
    inverter_options: Mapping[str, Any] = field(default_factory=dict)
    editor_options: Mapping[str, Any] = field(default_factory=dict)
    mask: str | None = None
    drags: tuple[tuple[int, int, int, int], ...] = ()
    in_turn: bool = False
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise RetourError(f"{name} is {value!r}: give a whole number")
        check_range("steps", self.steps, 1, MAX_STEPS)
        check_range("guidance", self.guidance, 0, 100)
        check_range("seed", self.seed, 0, MAX_SEED)
        for name, prompt in (("source", self.source or ""), ("target", self.target)):
            if len(prompt) > MAX_PROMPT:
                raise RetourError(
                    f"the {name} prompt has {len(prompt):,} characters: say it in {MAX_PROMPT:,}"
                )
        if len(self.drags) > MAX_DRAGS:
            raise RetourError(f"{len(self.drags)} drags are too many: at most {MAX_DRAGS}")
        if not self.dragging and not self.target.strip():
            raise RetourError("the target prompt is empty: say what the edit shall show")
        if self.dragging and not self.drags:
            raise RetourError(
                f"editor {self.editor!r} drags points: pick the drag tool and click where to take "
                "hold and where it shall go"
            )
        if get("edit", self.editor).facts.get("mask") and self.mask is None:
            raise RetourError(
                f"editor {self.editor!r} works inside a mask: paint where it may change"
            )

    @property
    def dragging(self) -> bool:
        """Whether the editor pulls points."""
        return takes_drags(get("edit", self.editor))

    @property
    def settings(self) -> dict[str, Any]:
        """Options of the editor, with the seed where it draws noise of its own."""
        own = dict(self.editor_options)
        if not self.dragging and takes_seed(get("edit", self.editor)):
            own["seed"] = self.seed
        return own


def takes_drags(entry: Entry) -> bool:
    """Whether an editor pulls points."""
    return "drags" in _names(entry)


def takes_seed(entry: Entry) -> bool:
    """Whether a method has a seed among its options."""
    return "seed" in _names(entry)


def _names(entry: Entry) -> set[str]:
    return {f.name for f in dataclasses.fields(entry.options)}


# --- Python ---------------------------------------------------------------------------------------


def to_python(recipe: Recipe, out: str = "edited.png") -> str:
    """A script that makes the picture again."""
    place = {k: getattr(recipe, k) for k in ("device", "dtype")}
    load = _call("retour.load", recipe.model, **{k: v for k, v in place.items() if v is not None})
    lines = ["import retour", "", f"model = {load}"]
    lines += _drag_lines(recipe) if recipe.dragging else _edit_lines(recipe)
    return "\n".join([*lines, f"result.save({out!r})", ""])


def _edit_lines(recipe: Recipe) -> list[str]:
    invert = _call(
        "retour.invert", Name("model"), recipe.picture, recipe.source,
        method=recipe.inverter, steps=recipe.steps, guidance=recipe.guidance, seed=recipe.seed,
        **recipe.inverter_options,
    )  # fmt: skip
    mask = {} if recipe.mask is None else {"mask": recipe.mask}
    edit = _call(
        "retour.edit", Name("inversion"), recipe.target,
        editor=recipe.editor, **mask, **recipe.settings,
    )  # fmt: skip
    return [f"inversion = {invert}", f"result = {edit}"]


def _drag_lines(recipe: Recipe) -> list[str]:
    given: dict[str, Any] = {"prompt": recipe.source}
    given |= {"target": recipe.target} if recipe.target.strip() else {}
    given |= {"mask": recipe.mask} if recipe.mask is not None else {}
    given |= {"editor": recipe.editor, "inverter": recipe.inverter, "steps": recipe.steps}
    given |= {"guidance": recipe.guidance, "seed": recipe.seed}
    if recipe.inverter_options:
        given["inverter_options"] = dict(recipe.inverter_options)
    drag = _call(
        "retour.drag", Name("model"), recipe.picture, rounds(recipe),
        **given, **recipe.settings,
    )  # fmt: skip
    return [f"result = {drag}"]


class Name(str):
    """Text that is code already."""

    def __repr__(self) -> str:
        return str(self)


def _call(function: str, *positional: Any, **named: Any) -> str:
    """A call, an argument a line where one line would be too long."""
    arguments = [repr(a) for a in positional] + [f"{k}={v!r}" for k, v in named.items()]
    line = f"{function}({', '.join(arguments)})"
    if len(line) <= 72:
        return line
    return "\n".join([f"{function}(", *(f"    {a}," for a in arguments), ")"])


def rounds(recipe: Recipe) -> str | list[str]:
    """The drags of a recipe as `retour.drag` takes them: all at once, or one after the other."""
    return [drag_text((d,)) for d in recipe.drags] if recipe.in_turn else drag_text(recipe.drags)


def drag_text(drags: tuple[tuple[int, int, int, int], ...]) -> str:
    """Drags as `retour.drag` reads them."""
    return "; ".join(f"{a},{b}>{c},{d}" for a, b, c, d in drags)


# --- Command line ---------------------------------------------------------------------------------


def to_cli(recipe: Recipe, out: str = "edited.png") -> str:
    """A command that makes the picture again, for a POSIX shell."""
    parts = [f"retour {'drag' if recipe.dragging else 'edit'} {_word(_path(recipe.picture))}"]
    if recipe.source is not None:
        parts.append(_option("source", recipe.source))
    for a, b, c, d in recipe.drags if recipe.dragging else ():
        parts.append(f"--from {a},{b} --to {c},{d}")
    parts += ["--in-turn"] * (recipe.dragging and recipe.in_turn)
    if recipe.target.strip():
        parts.append(_option("prompt" if recipe.dragging else "target", recipe.target))
    parts.append(f"--inverter {recipe.inverter} --editor {recipe.editor}")
    parts.append(_option("model", recipe.model))
    for name in ("device", "dtype"):
        if (value := getattr(recipe, name)) is not None:
            parts.append(_option(name, value))
    parts.append(f"--steps {recipe.steps} --guidance {recipe.guidance!r} --seed {recipe.seed}")
    if recipe.mask is not None:
        parts.append(_option("mask", _path(recipe.mask)))
    for flag, options in (("I", recipe.inverter_options), ("E", recipe.settings)):
        parts += [f"-{flag} {_word(f'{name}={value}')}" for name, value in options.items()]
    return " \\\n  ".join([*parts, f"-o {_word(out)}"]) + "\n"


def _option(name: str, value: str) -> str:
    # With the sign, a value that begins with a dash stays a value.
    return f"--{name} {_word(value)}" if not value.startswith("-") else f"--{name}={_word(value)}"


def _word(text: str) -> str:
    return shlex.quote(text)


def _path(name: str) -> str:
    """A file name that no command line takes for an option."""
    return f"./{name}" if name.startswith("-") else name


def file_name(given: str, otherwise: str = "picture") -> str:
    """A harmless PNG file name made of one that a stranger gave."""
    stem = PurePath(given.replace("\\", "/")).stem
    words = "".join(c if c.isalnum() or c in "-_" else " " for c in stem).split()
    kept = "-".join(words).strip("-_")[:40]
    return f"{kept or otherwise}.png"
