"""The page in Gradio: components, and which click goes where. Everything else is `desk`'s."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from ..errors import RetourError
from . import markup, menus
from .desk import DRAG_GUIDANCE, Desk, Form, Job, Menu
from .drawing import shown
from .recipe import Recipe
from .rooms import Entry, Room
from .samples import samples
from .work import Progress, Stopped

HERE = Path(__file__).parent
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
BROKEN = "something went wrong on the server, which has written down what: try other settings"

logger = logging.getLogger(__name__)


def theme() -> Any:
    """Calm colours and the system's own fonts: nothing is fetched from anywhere."""
    base = gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=list(FONTS),
        font_mono=list(MONO),
    )
    return base.set(
        body_background_fill="*neutral_50",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        background_fill_secondary="*neutral_100",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        color_accent="*primary_600",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
    )


def looks() -> dict[str, Any]:
    """Theme, styles and scripts."""
    script = (HERE / "page.js").read_text(encoding="utf-8")
    return {
        "theme": theme(),
        "css": (HERE / "page.css").read_text(encoding="utf-8"),
        "head": f"<script>{script}</script>",
    }


class _Plain(gr.Blocks):
    """Blocks whose visitors send texts and numbers, and nothing else.

    An object may pose as a file by its address, and the framework fetches what is there, or looks
    for it on this machine, before any component is asked.
    """

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], *more: Any, **named: Any
    ) -> Any:
        """Refuse what is neither text nor number; the rest is the framework's."""
        if any(isinstance(value, (dict, list)) for value in inputs):
            raise gr.Error("only texts and numbers are taken: reload the page")
        return await super().preprocess_data(block_fn, inputs, *more, **named)


class Page:
    """The page of a desk.

    Args:
        desk: what is behind it.
    """

    def __init__(self, desk: Desk):
        self.desk = desk
        first = desk.menu(desk.shelf.names[0])
        with _Plain(title="retour", analytics_enabled=False, fill_width=True) as blocks:
            self._build(first)
            self._wire()
        self.blocks = blocks

    # --- Components ---

    def _build(self, menu: Menu) -> None:
        gr.HTML(markup.header(self.desk.allowed), elem_id="u-head")
        with gr.Row(elem_id="u-main"):
            with gr.Column(elem_id="u-left"):
                with gr.Row(elem_id="u-stage"):
                    with gr.Column(elem_id="u-source"):
                        self.source = gr.HTML(markup.no_picture())
                        self.note = gr.HTML("", elem_id="u-note")
                    self.result = gr.HTML(markup.no_result(), elem_id="u-result")
                gr.HTML(markup.samples_strip(samples().values()), elem_id="u-samples")
                self.history = gr.HTML("", elem_id="u-history")
                self.again = gr.HTML("", elem_id="u-again")
            with gr.Column(elem_id="u-side"):
                self._build_prompts()
                self._build_methods(menu)
        with gr.Row(elem_id="u-hidden"):
            self.payload = gr.Textbox(elem_id="u-payload", show_label=False)
            self.take, self.pick, self.show, self.restore, self.refuse = (
                gr.Button(name, elem_id=f"u-{name}")
                for name in ("take", "pick", "show", "restore", "refuse")
            )

    def _build_prompts(self) -> None:
        with gr.Column(elem_id="u-prompts"):
            self.before = gr.Textbox(
                label="What the picture shows", lines=2, max_lines=4, elem_id="u-before",
                placeholder="a 3d render of a red apple; left empty, a guess is made",
            )  # fmt: skip
            self.guess = gr.Button("Guess it", size="sm", elem_id="u-guess")
            self.after = gr.Textbox(
                label="What it should show", lines=2, max_lines=4, elem_id="u-after",
                placeholder="a 3d render of a green apple",
            )  # fmt: skip
            self.words = gr.HTML("", elem_id="u-words")
            with gr.Row(elem_id="u-go"):
                self.run = gr.Button("Edit", variant="primary", elem_id="u-run")
                self.stop = gr.Button("Cancel", variant="stop", elem_id="u-stop", visible=False)
            self.said = gr.HTML("", elem_id="u-said")

    def _build_methods(self, menu: Menu) -> None:
        names = self.desk.shelf.names
        with gr.Column(elem_id="u-methods"):
            self.model = gr.Dropdown(
                names, value=names[0], label="Model", info=self.desk.shelf.summary(names[0]),
                elem_id="u-model",
            )  # fmt: skip
            self.editor = gr.Dropdown(
                _labels(menu.editors), value=menu.editor, label="Editor", elem_id="u-editor"
            )
            self.editor_facts = gr.HTML(_facts(menu, "editor"), elem_id="u-editor-facts")
            self.inverter = gr.Dropdown(
                _labels(menu.inverters), value=menu.inverter, label="Inverter", elem_id="u-inverter"
            )
            self.inverter_facts = gr.HTML(_facts(menu, "inverter"), elem_id="u-inverter-facts")
            with gr.Row(elem_id="u-numbers"):
                # Their bounds are the desk's, which says what is wrong with a number.
                self.steps = gr.Number(menu.steps, label="Steps", elem_id="u-steps")
                self.scale = gr.Number(
                    menu.guidance, label="Guidance", step=0.5, elem_id="u-guidance"
                )
                self.seed = gr.Number(0, label="Seed", elem_id="u-seed")
            with gr.Accordion("Options of the methods", open=False, elem_id="u-options"):
                self.edit_options = gr.HTML(_options("edit", menu.editor))
                self.invert_options = gr.HTML(_options("invert", menu.inverter))

    # --- Wiring ---

    def _wire(self) -> None:
        chosen = [self.model, self.editor, self.inverter]
        menu = [
            self.model, self.editor, self.editor_facts, self.inverter, self.inverter_facts,
            self.edit_options, self.invert_options,
        ]  # fmt: skip
        numbers = [self.steps, self.scale]
        prompts = [self.before, self.after, self.words]
        shown = [self.result, self.history, self.again, self.said]
        brought = [self.source, self.note, self.result, *prompts, self.again, self.said]
        _on(self.take.click, self._take, [self.payload], brought, js=PAYLOAD)
        _on(self.pick.click, self._pick, [self.payload], brought, js=PAYLOAD)
        _on(self.refuse.click, self._refuse, [self.payload], [self.note], js=PAYLOAD)
        _on(self.show.click, self._show, [self.payload], shown, js=PAYLOAD)
        _on(self.restore.click, self._restore, [self.payload],
            [*shown, self.source, self.note, *prompts, *menu, *numbers, self.seed],
            js=PAYLOAD)  # fmt: skip
        _on(self.guess.click, self._guess, [], [self.before, self.guess, self.words, self.said],
            concurrency_limit=None)  # fmt: skip
        # One listener for both prompts: of two, an earlier answer could come last and stay.
        changes = partial(gr.on, [self.before.change, self.after.change])
        _on(changes, markup.words, [self.before, self.after], [self.words],
            queue=False, trigger_mode="always_last")  # fmt: skip
        _on(self.model.input, self._choose_model, chosen, [*menu, *numbers])
        _on(self.editor.input, self._choose_editor, [*chosen, self.scale], [*menu, *numbers])
        _on(self.inverter.input, self._choose_inverter, chosen, menu)
        _on(
            self.run.click, self._run, [self.before, self.after, *chosen, *numbers, self.seed,
            self.payload],
            [*shown, self.run, self.stop, self.before], js=GATHER, concurrency_limit=None,
        )  # fmt: skip
        _on(self.stop.click, self._stop, [], [self.stop], queue=False)
        # The framework calls this when the visitor has gone.
        gr.context.Context.root_block.unload(self._leave)  # type: ignore[union-attr]

    # --- Answers ---

    def _take(self, text: str, request: gr.Request) -> Any:
        try:
            room = self.desk.upload(request.session_hash, text)
        except RetourError as error:
            return self._refused(str(error))
        return self._brought(room, "", "")

    def _pick(self, name: str, request: gr.Request) -> Any:
        try:
            chosen = self.desk.pick(request.session_hash, name)
        except RetourError as error:
            return self._refused(str(error))
        room = self.desk.rooms.enter(request.session_hash)
        return self._brought(room, chosen.prompt, chosen.target)

    def _brought(self, room: Room, before: str, after: str) -> Any:
        assert room.picture is not None
        source, words = markup.picture(room.picture, room.name), markup.words(before, after)
        note = markup.reduction(room.given)
        return source, note, markup.no_result(), before, after, words, "", ""

    def _refused(self, said: str) -> Any:
        """The old picture stays, with what was drawn on it."""
        return gr.skip(), markup.notice(said), *[gr.skip()] * 6

    def _refuse(self, said: str) -> str:
        return markup.notice(said[:300])

    def _show(self, number: str, request: gr.Request) -> Any:
        try:
            entry = self.desk.show(request.session_hash, number)
        except RetourError as error:
            return *[gr.skip()] * 3, markup.notice(str(error))
        return *_finished(self.desk.rooms.enter(request.session_hash), entry), ""

    def _restore(self, number: str, request: gr.Request) -> Any:
        try:
            entry = self.desk.restore(request.session_hash, number)
            recipe = entry.made.recipe
            model = self.desk.shelf.shown(recipe.model)
            menu = self.desk.menu(model, recipe.editor, recipe.inverter)
        except RetourError as error:
            return *[gr.skip()] * 3, markup.notice(str(error)), *[gr.skip()] * 15
        source, target = recipe.source or "", recipe.target
        picture = markup.picture(entry.picture, recipe.picture, entry.mask, recipe.drags)
        prompts = source, target, markup.words(source, target)
        numbers = recipe.steps, recipe.guidance, recipe.seed
        shown = _finished(self.desk.rooms.enter(request.session_hash), entry)
        return *shown, "", picture, "", *prompts, *self._menu_updates(menu, recipe), *numbers

    def _guess(self, request: gr.Request) -> Iterator[Any]:
        wait = gr.update(value="Guessing", interactive=False)
        ready = gr.update(value="Guess it", interactive=True)
        same = gr.skip()
        try:
            ticket = self.desk.guess(request.session_hash)
            yield same, wait, same, ""
            prompt = ticket.result()
        except (RetourError, Stopped) as error:
            yield same, ready, same, markup.notice(str(error))
            return
        yield prompt, ready, same, same

    def _run(
        self, before: str, after: str, model: str, editor: str, inverter: str,
        steps: Any, scale: Any, seed: Any, drawn: str, request: gr.Request,
    ) -> Iterator[Any]:  # fmt: skip
        idle, busy = _buttons(False), _buttons(True)
        same = gr.skip()
        form = Form(before, after, model, editor, inverter, steps, scale, seed, drawn)
        try:
            job = self.desk.begin(request.session_hash, form)
        except RetourError as error:
            yield same, same, same, markup.notice(str(error)), *idle, same
            return

        def ended(said: str, kind: str = "error") -> Any:
            """What was shown before the job, and why it has no result."""
            last = job.room.shown
            result = markup.no_result() if last is None else markup.result(last)
            return result, same, same, markup.notice(said, kind), *idle, same

        try:
            for html in _progress(job):
                yield html, same, same, "", *busy, same
            entry = job.finish()
        except Stopped:
            yield ended("Stopped.", "info")
        except RetourError as error:
            yield ended(str(error))
        except GeneratorExit:  # the visitor has gone
            job.ticket.cancel()
            raise
        except Exception:
            logger.exception("a job failed")
            yield ended(BROKEN)
        else:
            # A guess is filled in, unless another picture has come meanwhile.
            guessed = not before.strip() and job.room.picture is job.picture
            source = entry.made.recipe.source if guessed else same
            yield *_finished(job.room, entry), "", *idle, source

    def _stop(self, request: gr.Request) -> Any:
        self.desk.cancel(request.session_hash)
        return gr.update(interactive=False, value="Stopping")

    def _leave(self, request: gr.Request) -> None:
        self.desk.rooms.leave(request.session_hash)

    def _choose_model(self, model: str, editor: str, inverter: str) -> Any:
        menu = self._menu(model, editor, inverter)
        return *self._menu_updates(menu), menu.steps, menu.guidance

    def _choose_editor(self, model: str, editor: str, inverter: str, scale: Any) -> Any:
        # Its own inverter, not the last editor's; a scale of the visitor's own stays.
        menu = self._menu(model, editor, None)
        usual = scale in (DRAG_GUIDANCE, menu.model.default_guidance)
        return *self._menu_updates(menu), gr.skip(), menu.guidance if usual else gr.skip()

    def _choose_inverter(self, model: str, editor: str, inverter: str) -> Any:
        return self._menu_updates(self._menu(model, editor, inverter))

    def _menu(self, model: str, editor: str, inverter: str | None) -> Menu:
        try:
            return self.desk.menu(model, editor, inverter)
        except RetourError as error:
            raise gr.Error(str(error)) from None

    def _menu_updates(self, menu: Menu, recipe: Recipe | None = None) -> list[Any]:
        """The menus and forms; with a recipe, as they were for it."""
        given = {} if recipe is None else _given(recipe)
        return [
            gr.update(value=menu.name, info=self.desk.shelf.summary(menu.name)),
            gr.update(choices=_labels(menu.editors), value=menu.editor),
            _facts(menu, "editor"),
            gr.update(choices=_labels(menu.inverters), value=menu.inverter),
            _facts(menu, "inverter"),
            _options("edit", menu.editor, given.get("edit")),
            _options("invert", menu.inverter, given.get("invert")),
        ]


PAYLOAD = "() => window.retour.payload()"
GATHER = "(...values) => window.retour.gather(...values)"


def _on(event: Callable[..., Any], answer: Any, inputs: Any, outputs: Any, **more: Any) -> None:
    """Listen to an event, without offering it to programs."""
    event(answer, inputs, outputs, show_progress="hidden", api_visibility="private", **more)


def _labels(choices: list[menus.Choice]) -> list[tuple[str, str]]:
    return [(f"{c.name}: {c.summary}", c.name) for c in choices if not c.refused]


def _facts(menu: Menu, which: str) -> str:
    choices = menu.editors if which == "editor" else menu.inverters
    name = menu.editor if which == "editor" else menu.inverter
    chosen = next(c for c in choices if c.name == name)
    return markup.method(chosen, choices, which)


def _options(task: str, name: str, given: Mapping[str, Any] | None = None) -> str:
    return markup.options(task, name, menus.form(task, name), given)


def _given(recipe: Recipe) -> dict[str, Mapping[str, Any]]:
    """The options that a recipe was made with, by task."""
    edit = {**recipe.editor_options} | ({menus.IN_TURN.name: True} if recipe.in_turn else {})
    return {"edit": edit, "invert": recipe.inverter_options}


def _buttons(busy: bool) -> tuple[Any, Any]:
    """The buttons to run and to cancel."""
    cancel = gr.update(visible=busy)
    if not busy:
        cancel = gr.update(visible=False, interactive=True, value="Cancel")
    return gr.update(visible=not busy), cancel


def _finished(room: Room, entry: Entry) -> tuple[str, str, str]:
    strip = markup.history(list(room.history), entry.number)
    return markup.result(entry), strip, markup.reproduce(entry)


def _progress(job: Job) -> Iterator[str]:
    """What the result's place shows while a job waits and works."""
    yield markup.waiting(job.picture, job.ticket.ahead)
    seen: Progress | None = None
    preview = ""
    for news in job.follow():
        if news is not None:
            seen = news
        if seen is None:
            yield markup.waiting(job.picture, job.ticket.ahead)
            continue
        if seen.preview is not None or not preview:
            preview = shown(seen.preview if seen.preview is not None else job.picture)
        yield markup.working(job.picture, seen, preview, job.seconds)
