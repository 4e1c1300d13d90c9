"""The page's own HTML. Everything that a visitor or a method wrote is escaped here.

The framework changes elements in place rather than replace them, and what the browser holds about
one (a drawing, a value that was typed) would stay with the next. `data-made` tells them apart: the
script begins anew where it changes.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from ..io import Limits, Size, plain
from .drawing import Drags, data_url, fractions, painting, png_url, shown, thumbnail
from .menus import Choice, Field
from .recipe import file_name, to_cli, to_python
from .rooms import Entry
from .samples import Sample
from .words import differences
from .work import Progress

PHASES = {"invert": "Going back to noise", "edit": "Returning with the edit"}


def tag(name: str, content: str = "", /, **attributes: str) -> str:
    """An element; `content` is HTML, attribute values are escaped, `class_` is `class`."""
    given = "".join(
        f' {k.rstrip("_").replace("_", "-")}="{escape(v)}"' for k, v in attributes.items()
    )
    return f"<{name}{given}>{content}</{name}>"


def header(allowed: Limits) -> str:
    """The page's head, and the file chooser that the rest of the page opens."""
    title = tag("h1", "retour")
    line = tag("span", "Take a picture back through a model, and return with an edit.")
    most = str(allowed.bytes or 0)
    chooser = (
        f'<input type="file" id="r-file" accept="image/*" hidden data-most="{most}" '
        'aria-label="Picture file">'
    )
    return tag("header", title + line + chooser, class_="r-head")


# --- The picture ----------------------------------------------------------------------------------


def no_picture() -> str:
    """The invitation to bring a picture."""
    inside = (
        ICON_PICTURE
        + tag("b", "Drop a picture here")
        + tag("span", "or click to choose one, paste it, or try an example below")
    )
    box = tag("button", inside, class_="r-drop", type="button", data_choose="1")
    return tag("div", box, class_="r-frame r-square")


def picture(
    image: Image.Image, name: str, mask: Image.Image | None = None, drags: Drags = ()
) -> str:
    """The picture to edit, with a canvas over it and the tools; what was drawn is drawn again."""
    width, height = image.size
    scale = min(1.0, 512 / max(width, height)) if max(width, height) > 512 else 512 / max(
        width, height
    )  # fmt: skip
    size = {"width": str(round(width * scale)), "height": str(round(height * scale))}
    drawn = {"data_points": json.dumps(fractions(drags, image.size))} if drags else {}
    drawn |= {"data_mask": png_url(painting(mask))} if mask is not None else {}
    inside = f'<img src="{shown(image)}" alt="{escape(name)}" draggable="false">' + tag(
        "canvas", "", **size, **drawn, data_made=secrets.token_hex(4), role="img",
        aria_label="What is drawn over the picture",
    )  # fmt: skip
    frame = tag("div", inside, class_="r-frame r-paint", style=_ratio(image), data_tool="none")
    return frame + _tools(name, image)


def _tools(name: str, image: Image.Image) -> str:
    tools = (
        ("paint", "Paint mask", "Paint where the edit may act; the rest is kept."),
        ("erase", "Erase", "Take paint away."),
        ("drag", "Drag points", "Click where to take hold, then where it should go."),
    )
    buttons = "".join(
        tag(
            "button", escape(label), type="button", data_tool=tool, title=said, aria_pressed="false"
        )
        for tool, label, said in tools
    )
    brush = (
        '<label class="r-brush" hidden>Brush <input type="range" id="r-brush" min="2" max="30" '
        'value="9"></label>'
    )
    clear = tag(
        "button", "Clear", type="button", data_clear="1", title="Take all drawing away", hidden=""
    )
    told = tag("div", tag("span", role="status") + brush, class_="r-told", hidden="")
    change = tag("button", "Change picture", type="button", data_choose="1", class_="r-quiet")
    size = f"{escape(name)}, {image.width} x {image.height} pixels. "
    row = tag("div", buttons + clear, class_="r-tools", role="group", aria_label="Drawing tools")
    return row + told + tag("p", size + change, class_="r-hint")


def reduction(given: Size | None) -> str:
    """That a picture was made smaller, if it was."""
    if given is None:
        return ""
    width, height = given
    said = f"reduced from {width:,} x {height:,} pixels, which is more than any model works at."
    return notice(said, "info")


def _ratio(image: Image.Image) -> str:
    return f"--w:{image.width};--h:{image.height}"


def notice(text: str, kind: str = "error") -> str:
    """A sentence that is to be seen at once; nothing where there is none."""
    said = text[:1].upper() + text[1:]
    return tag("p", escape(said), class_=f"r-notice r-{kind}", role="alert") if text else ""


# --- The result -----------------------------------------------------------------------------------


def no_result() -> str:
    """What stands where the result will."""
    steps = ("Choose a picture", "Say what it shows, and what it should show", "Press Edit")
    items = "".join(tag("li", s) for s in steps)
    box = tag("div", tag("b", "The result appears here") + tag("ol", items), class_="r-empty")
    return tag("div", box, class_="r-frame r-square")


def waiting(image: Image.Image, ahead: int) -> str:
    """A job in the line, or before its first step."""
    said = "Starting"
    if ahead:
        said = f"In the queue: {ahead} job{'s' if ahead > 1 else ''} before yours"
    return _working(shown(image), image, said, "", 0.0)


def working(image: Image.Image, progress: Progress, preview: str, seconds: float) -> str:
    """A job at work; `preview` is a data URL."""
    said = f"{PHASES[progress.phase]}: step {progress.step} of {progress.steps}"
    return _working(preview, image, said, f"{seconds:.0f} s", progress.fraction)


def _working(url: str, image: Image.Image, said: str, more: str, fraction: float) -> str:
    bar = tag(
        "div", f'<i style="width:{100 * fraction:.1f}%"></i>', class_="r-bar", role="progressbar",
        aria_label="Progress of the edit", aria_valuemin="0", aria_valuemax="100",
        aria_valuenow=f"{100 * fraction:.0f}",
    )  # fmt: skip
    text = tag("div", tag("b", escape(said)) + tag("span", escape(more)), class_="r-status")
    inside = f'<img src="{url}" alt="Work in progress">' + bar
    return tag("div", inside, class_="r-frame r-busy", style=_ratio(image)) + text


def result(entry: Entry) -> str:
    """Before and after under a slider, the download, what was asked for and what it cost."""
    before, after = entry.made.before, entry.made.after
    inside = (
        f'<img src="{shown(after)}" alt="After">'
        f'<img class="r-before" src="{shown(before)}" alt="Before">'
        '<span class="r-label">Before</span><span class="r-label r-right">After</span><i></i>'
        '<input type="range" min="0" max="100" value="50" step="0.5" '
        'aria-label="Compare before and after" '
        "oninput=\"this.parentNode.style.setProperty('--cut', this.value + '%')\">"
    )
    style = f"{_ratio(before)};--cut:50%"
    frame = tag("div", inside, class_="r-frame r-compare", style=style, data_made=str(entry.number))
    name = file_name(entry.made.recipe.picture).removesuffix(".png") + f"-{entry.number}.png"
    save = tag(
        "a", "Download PNG", href=data_url(entry.made.png), download=name, class_="r-button",
        title="With the record of the run inside",
    )  # fmt: skip
    again = tag(
        "button", "Use these settings", type="button", data_restore=str(entry.number),
        title="Picture, prompts, methods and drawing as they were for this result",
    )  # fmt: skip
    row = tag("div", save + again, class_="r-tools")
    unread = "".join(
        notice(f"Too long for this model, so not read: {cut}", "info") for cut in entry.made.unread
    )
    return frame + row + tag("div", _asked(entry) + unread, class_="r-asked")


def _asked(entry: Entry) -> str:
    """What a result was asked for, how it was made, and what it cost."""
    recipe, evaluations = entry.made.recipe, entry.made.record["nfe"]
    how = f"{recipe.editor} + {recipe.inverter}, {recipe.steps} steps: "
    cost = f"{evaluations:.0f} network evaluations, {entry.seconds:.1f} s"
    return words(recipe.source or "", recipe.target) + tag("p", escape(how + cost), class_="r-hint")


def history(entries: Sequence[Entry], current: int | None = None) -> str:
    """Thumbnails of this visit's results, newest first."""
    if not entries:
        return ""
    items = "".join(
        tag(
            "button",
            f'<img src="{thumbnail(e.made.after)}" alt="">' + tag("span", escape(_brief(e))),
            type="button",
            data_result=str(e.number),
            title=_title(e),
            aria_label=f"Show result {e.number}: {_title(e)}",
            aria_current="true" if e.number == current else "false",
        )  # fmt: skip
        for e in reversed(entries)
    )
    return tag("h2", "Results of this visit") + tag("div", items, class_="r-strip")


def _brief(entry: Entry) -> str:
    """What is new in a result, for a place of a few letters."""
    recipe = entry.made.recipe
    if not recipe.target:
        return "drag"
    told = differences(recipe.source or "", recipe.target)
    new, gone = (" ".join(text for kind, text in told if kind == k) for k in ("new", "gone"))
    return new or (f"− {gone}" if gone else recipe.editor)


def _title(entry: Entry) -> str:
    recipe = entry.made.recipe
    return f"{recipe.target or 'drag'} ({recipe.editor} + {recipe.inverter})"


def samples_strip(samples: Iterable[Sample]) -> str:
    """The examples."""
    items = "".join(
        tag(
            "button",
            f'<img src="{thumbnail(s.picture)}" alt="">',
            type="button",
            data_sample=s.name,
            title=s.prompt,
            aria_label=f"Example: {s.prompt}",
        )  # fmt: skip
        for s in samples
    )
    return tag("h2", "Examples") + tag("div", items, class_="r-strip r-small")


# --- The recipe -----------------------------------------------------------------------------------


def reproduce(entry: Entry | None) -> str:
    """How to make the very picture again, and the whole record."""
    if entry is None:
        return ""
    recipe = entry.made.recipe
    texts = {
        "Python": to_python(recipe),
        "Command line": to_cli(recipe),
        "Record": json.dumps(plain(entry.made.record), indent=2, ensure_ascii=False),
    }
    tabs, panels = "", ""
    for number, (label, text) in enumerate(texts.items()):
        chosen = "true" if number == 0 else "false"
        tabs += tag(
            "button", label, type="button", role="tab", data_tab=str(number), aria_selected=chosen,
            id=f"r-tab-{number}", aria_controls=f"r-panel-{number}",
            tabindex="0" if number == 0 else "-1",
        )  # fmt: skip
        copy = tag("button", f"Copy {_as(label)}", type="button", class_="r-copy", data_copy="1")
        hidden = {} if number == 0 else {"hidden": ""}
        code = tag("pre", escape(text), tabindex="0")
        named = {"id": f"r-panel-{number}", "aria_labelledby": f"r-tab-{number}"}
        panels += tag("div", copy + code, class_="r-code", role="tabpanel", **named, **hidden)
    links = _link("Picture", recipe.picture, entry.picture)
    if recipe.mask is not None and entry.mask is not None:
        links += _link("Mask", recipe.mask, entry.mask)
    files = tag("p", "Files that it reads, to save beside it: " + links, class_="r-hint")
    head = tag("h2", "Make it again") + tag("div", tabs, class_="r-tabs", role="tablist")
    return tag("section", head + panels + files, class_="r-again")


def _as(label: str) -> str:
    return {"Python": "as Python", "Command line": "as CLI", "Record": "as JSON"}[label]


def _link(label: str, name: str, image: Image.Image) -> str:
    link = tag("a", escape(name), href=png_url(image), download=name, data_file=label.lower())
    return f"{link} "


# --- Words and methods ----------------------------------------------------------------------------


def words(source: str, target: str) -> str:
    """The target prompt with what is new, and what is gone, marked."""
    if not target.strip() or not source.strip():
        return ""
    marks = {"same": "span", "gone": "del", "new": "ins"}
    parts = [tag(marks[kind], escape(text)) for kind, text in differences(source, target)]
    return tag("p", " ".join(parts), class_="r-words")


def method(choice: Choice, choices: Sequence[Choice], what: str) -> str:
    """Facts of the chosen method, and why others cannot be chosen."""
    chips = "".join(tag("li", escape(fact), title=_meaning(fact)) for fact in choice.facts)
    line = tag("p", escape(choice.summary), class_="r-summary") + tag("ul", chips, class_="r-chips")
    refused = [c for c in choices if c.refused]
    if not refused:
        return line
    items = "".join(tag("li", tag("b", escape(c.name)) + " " + escape(c.refused)) for c in refused)
    many = f"{what}s do" if len(refused) > 1 else f"{what} does"
    summary = tag("summary", f"{len(refused)} {many} not fit here: why?")
    return line + tag("details", summary + tag("ul", items), class_="r-refused")


def _meaning(fact: str) -> str:
    """What a fact means, where it is a term."""
    if "evaluations" in fact:
        return "How often the network is asked, of which the time is made; N is the steps"
    return {
        "exact round trip": "Without an edit, the way back ends at the picture",
        "random": "Another seed gives another picture",
    }.get(fact, "")


def options(
    task: str, name: str, fields: Sequence[Field], given: Mapping[str, Any] | None = None
) -> str:
    """The form of a method's options, with the values given in place of their defaults."""
    title = tag("h3", escape(name))
    if not fields:
        return title + tag("p", "This method has no options.", class_="r-hint")
    values = {} if given is None else given
    body = "".join(_field(field, str(values.get(field.name, field.shown))) for field in fields)
    # Another method's form, or one that is filled in again, forgets what was typed.
    made = name if given is None else f"{name} {secrets.token_hex(4)}"
    return title + tag("div", body, class_="r-options", data_task=task, data_made=made)


def _field(field: Field, value: str) -> str:
    default = field.shown
    known: dict[str, str] = {"name": field.name, "data_default": default}
    if field.kind in ("choice", "switch"):
        choices = list(field.choices) if field.kind == "choice" else ["True", "False"]
        named = [("", "automatic")] if field.optional and default == "" else []
        named += [(c, {"True": "yes", "False": "no"}.get(c, c)) for c in choices]
        body = "".join(
            tag("option", escape(label), value=option, **_selected(option == value))
            for option, label in named
        )
        control = tag("select", body, **known)
    else:
        mode = {"whole": "numeric", "number": "decimal", "text": "text"}[field.kind]
        known |= {"value": value, "inputmode": mode, "type": "text"}
        known |= {"placeholder": "automatic"} if field.optional else {}
        control = tag("input", "", **known).replace("></input>", ">")
    said = tag("small", escape(field.help))
    label = tag("span", escape(field.name.replace("_", " ")))
    return tag("label", label + control + said, title=field.help)


def _selected(yes: bool) -> dict[str, Any]:
    return {"selected": ""} if yes else {}


ICON_PICTURE = (
    '<svg viewBox="0 0 24 24" width="40" height="40" fill="none" stroke="currentColor" '
    'stroke-width="1.4" stroke-linecap="round" stroke-linejoin="round" aria-hidden="true">'
    '<rect x="3" y="4" width="18" height="16" rx="2"/><circle cx="9" cy="10" r="1.6"/>'
    '<path d="m4 18 5-5 3.5 3.5L16 13l4.5 4.5"/></svg>'
)
