"""The main job in three functions: `invert`, `reconstruct`, `edit`.

An inversion is made once and can be edited many times; every function returns its record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ._inputs import (
    MAX_GUIDANCE,
    ModelLike,
    as_model,
    fit_all,
    guidance_of,
    masks_of,
    model_of,
    prompts_or_proposed,
    targets_of,
)
from ._pairs import refuse_impossible, usual_inverter
from .core.branches import Branch, Denoiser, Layout
from .core.control import Control
from .core.guidance import Guidance
from .core.loop import Observer, walk
from .core.model import Condition, Ledger, Model
from .core.registry import Entry, build_options, entries, get
from .core.state import Inversion
from .editors.base import EditJob, Editor, Start
from .editors.blend import MaskBlend
from .errors import check_finite, check_seed, unknown
from .inverters.base import Job, Replay, way_back
from .io import Clip, Placement, to_clip, to_image, to_tensor
from .pictures import Pictures, placements_in
from .record import describe_run

__all__ = [
    "MAX_GUIDANCE",
    "ModelLike",
    "Result",
    "as_model",
    "cite",
    "decode",
    "edit",
    "encode",
    "invert",
    "methods",
    "reconstruct",
    "refuse_edit",
    "refuse_impossible",
    "usual_inverter",
]


@dataclass
class Result(Pictures):
    """What came back.

    Attributes:
        images: one picture per edit (or per input, for a reconstruction), at the model's size.
        latents: their latents (R, C, h, w).
        inversion: where they came from.
        record: facts of the run: options, seeds, versions, NFE, seconds, peak memory.
        source: the source branch's own latents at the end of the run, if it was carried.
        placements: how each picture goes back to its original size.
    """

    images: list[Image.Image]
    latents: Tensor
    inversion: Inversion
    record: dict[str, Any]
    source: Tensor | None = None
    placements: list[Placement] = field(default_factory=list)


def methods(task: str | None = None, **facts: Any) -> list[Entry]:
    """All methods whose declared facts match, e.g. `methods(task="invert", exact=True)`.

    Args:
        task: `solver`, `invert`, `edit`, `attack` or `restore`; None: of all tasks.
        facts: fields of an entry, and what they shall be; `needs`, `requires` and `provides` match
            where they contain the given text.

    Returns:
        The entries, sorted by task and name.

    Raises:
        RetourError: there is no such task or fact.
    """
    return entries(task, **facts)


def cite(what: Pictures | Inversion | Entry | str) -> str:
    """BibTeX of everything that made a result, or of a method by name.

    Args:
        what: a result or another run's pictures, an inversion, a method, or its name, of whatever
            task.

    Returns:
        Entries with an empty line between, each paper once.

    Raises:
        RetourError: there is no such method.
    """
    found = [what] if isinstance(what, Entry) else _methods_of(what)
    keys = {e.paper: f"{e.name.replace('-', '')}{e.paper.year}" for e in found}
    return "\n\n".join(paper.bibtex(key) for paper, key in keys.items())


def _methods_of(what: Pictures | Inversion | str) -> list[Entry]:
    if isinstance(what, str):
        named = [e for e in entries() if e.name == what]
        if not named:
            raise unknown("method", what, {e.name for e in entries()})
        return named
    if isinstance(what, Inversion):
        return [get("invert", what.method)]
    kinds = {"invert": "inverter", "edit": "editor", "attack": "attack", "restore": "restorer"}
    return [get(task, what.record[k]) for task, k in kinds.items() if k in what.record]


# --- Inversion ------------------------------------------------------------------------------------


def invert(
    model: ModelLike,
    image: Any,
    prompt: str | Sequence[str] | None = None,
    *,
    method: str = "direct",
    steps: int | None = None,
    guidance: float | None = None,
    negative: str = "",
    seed: int = 0,
    rule: Guidance | None = None,
    controls: Sequence[Control] = (),
    check: Callable[[Inversion], None] | None = None,
    **options: Any,
) -> Inversion:
    """Take images back to the noise that this model would have made them from.

    Args:
        model: a loaded model, a name, a folder, a hub id or a diffusers pipeline.
        image: a path, PIL image, array, or tensor (3, H, W); or a list of them (one batch). For a
            video model a clip, see :func:`retour.io.read_clip`; a list is a batch of them.
        prompt: what the image shows, one for all or one each; None asks the caption proposer.
        method: a registered inverter.
        steps: steps of the time grid; None takes the model's default.
        guidance: guidance scale of the way back; None takes the model's default.
        negative: negative prompt of the guidance.
        seed: seed of all noise that the method draws.
        rule: how guidance combines predictions; None is classifier-free guidance.
        controls: further controls for the walk.
        check: called before the network is, with a stand-in of the inversion that has the data at
            every level; what it raises ends the run. See :func:`refuse_edit`.
        options: options of the method.

    Returns:
        The inversion, with its record.

    Raises:
        RetourError: for input that cannot be used, before any work.
    """
    model = as_model(model)
    entry = get("invert", method)
    inverter = entry.make(**options)
    refuse_impossible(model, entry)
    pictures, placements = fit_all(model, image)
    prompts, proposed = prompts_or_proposed(prompt, pictures)
    scale = guidance_of(model, guidance)
    steps = model.default_steps if steps is None else steps
    ledger = Ledger()
    height, width = placements[0].canvas[1], placements[0].canvas[0]
    job = Job(
        model=model,
        latents=encode(model, pictures),
        condition=model.embed(prompts, size=(height, width)),
        negative=model.embed([negative] * len(prompts), size=(height, width)),
        grid=model.grid(steps, size=(height, width)),
        guidance=scale,
        generator=torch.Generator().manual_seed(check_seed("seed", seed)),
        rule=rule,
        ledger=ledger,
        controls=controls,
    )
    placed = [p.told() for p in placements]
    if check is not None:
        check(_stand_in(job, entry, options, placed))
    inversion = inverter.invert(job)
    check_finite(inversion.noise, "the inverted latents", "use fewer steps or a smaller guidance")
    asked = {
        "inverter": method,
        "inverter_options": inversion.options,
        "prompts": list(prompts),
        "prompts_proposed": proposed,
        "negative": negative,
        "steps": job.grid.steps,
        "guidance": scale,
        "seed": seed,
        "cut": _cut(model, prompts),
        "placements": placed,
    }
    found = inversion.record  # what the method wants remembered
    inversion.record = {**found, **describe_run("invert", model, ledger, len(prompts), asked)}
    return inversion


def _stand_in(
    job: Job, entry: Entry, options: dict[str, Any], placed: list[dict[str, Any]]
) -> Inversion:
    states = {"x": job.latents.expand(job.grid.steps + 1, *job.latents.shape)}
    found = job.pack(entry.name, build_options(entry, options), job.grid, states)
    found.record = {"steps": job.grid.steps, "placements": placed}
    return found


def encode(model: Model, pictures: Sequence[Image.Image | Clip]) -> Tensor:
    """Pictures of one size -> float64 latents (B, C, h, w); clips -> (B, C, f, h, w)."""
    latents = model.encode(torch.stack([to_tensor(p) for p in pictures]))
    check_finite(latents, "the encoded latents", "load the model in float32")
    return latents


def decode(model: Model, latents: Tensor) -> list[Any]:
    """Latents (B, C, h, w) -> pictures; (B, C, f, h, w) -> clips."""
    check_finite(latents, "the edited latents", "use more steps or a smaller guidance")
    show = to_clip if "video" in model.capabilities else to_image
    return [show(pixels) for pixels in model.decode(latents)]


def _cut(model: Model, prompts: Sequence[str]) -> dict[str, str]:
    cuts = {p: model.tokens(p).cut for p in prompts}
    return {p: cut for p, cut in cuts.items() if cut}


# --- The way back ---------------------------------------------------------------------------------


def reconstruct(inversion: Inversion, *, guidance: float | None = None) -> Result:
    """Return along the source prompt: what the inversion's round trip gives.

    Args:
        inversion: from :func:`invert`, with its model attached.
        guidance: guidance scale; None takes the one it was made for.

    Returns:
        A picture for each image of the inversion, at the model's size, with its record.

    Raises:
        RetourError: the inversion has no model, or the guidance is none.
    """
    model = model_of(inversion)
    scale = inversion.guidance if guidance is None else guidance_of(model, guidance)
    replay = _replay(inversion, model)
    denoiser = Denoiser(model, [_branch("source", inversion.condition, inversion, scale)])
    latents = _descend(replay, inversion, denoiser, Start(replay.state, inversion.grid.steps))
    asked = {"inverter": inversion.method, "prompts": list(inversion.prompts), "guidance": scale}
    record = describe_run("reconstruct", model, denoiser.ledger, inversion.images, asked)
    return _result(model, latents, inversion, {**record, "inversion": inversion.record})


def edit(
    inversion: Inversion,
    target: str | Sequence[str],
    *,
    editor: str = "p2p",
    guidance: float | None = None,
    mask: Any = None,
    rule: Guidance | None = None,
    observers: Sequence[Observer] = (),
    **options: Any,
) -> Result:
    """Return from an inversion with an edit.

    Args:
        inversion: from :func:`invert`, with its model attached.
        target: one prompt for all images; or, for a batch, one each; or several for a single image
            (one result each, all in one batch).
        editor: a registered editor.
        guidance: guidance scale; None takes the one the inversion was made for.
        mask: where editing is allowed (white, 1): a path, PIL image or array of the input's size;
            or a list of them, one for each image. Outside of it the source comes back.
        rule: how guidance combines predictions; None is classifier-free guidance.
        observers: callables that see each step (previews, monitors).
        options: options of the editor.

    Returns:
        One picture for each image, or for each target of a single image, at the model's size; the
        record counts the inversion, too. Whom to cite: :func:`cite` of it.

    Raises:
        RetourError: for input that cannot be used, before any work.
    """
    model = model_of(inversion)
    plan = _editor(inversion, editor, options)
    replay = plan.replay(_replay(inversion, model))
    scale = inversion.guidance if guidance is None else guidance_of(model, guidance)
    denoiser, job, controls = _arranged(
        inversion, target, plan, scale, mask, rule, replay.source_branch
    )
    start = plan.prepare(job, denoiser, replay)
    latents = _descend(replay, inversion, denoiser, start, controls, observers)
    prompts = [p for ps in job.targets.values() for p in ps]
    asked = {
        "inverter": inversion.method,
        "inverter_options": inversion.options,
        "editor": editor,
        "editor_options": vars(plan.options) if hasattr(plan, "options") else {},
        "prompts": list(inversion.prompts),
        "targets": prompts,
        "guidance": scale,
        "masked": mask is not None,
        **start.facts,
        "cut": _cut(model, prompts),
    }
    record = describe_run("edit", model, denoiser.ledger, inversion.images, asked)
    record = {**record, "inversion": inversion.record}
    record["nfe_edit"] = record["nfe"]
    record["nfe"] = record["nfe_edit"] + inversion.record.get("nfe", 0.0)
    return _edit_result(model, latents, inversion, denoiser.layout, record)


def refuse_edit(
    inversion: Inversion,
    target: str | Sequence[str],
    *,
    editor: str = "p2p",
    guidance: float | None = None,
    mask: Any = None,
    **options: Any,
) -> None:
    """Refuse what :func:`edit` would, without walking: as `check` of :func:`invert`, before both.

    Args:
        inversion: an inversion or the stand-in of one.
        target: as for :func:`edit`.
        editor: as for :func:`edit`.
        guidance: as for :func:`edit`.
        mask: as for :func:`edit`.
        options: options of the editor.

    Raises:
        RetourError: for input that cannot be used.
    """
    plan = _editor(inversion, editor, options)
    scale = inversion.guidance if guidance is None else guidance_of(inversion.attached(), guidance)
    _arranged(inversion, target, plan, scale, mask, None, False)


def _editor(inversion: Inversion, editor: str, options: dict[str, Any]) -> Editor:
    entry = get("edit", editor)
    plan: Editor = entry.make(**options)
    refuse_impossible(inversion.attached(), get("invert", inversion.method), entry)
    return plan


def _arranged(
    inversion: Inversion,
    target: str | Sequence[str],
    plan: Editor,
    scale: float,
    mask: Any,
    rule: Guidance | None,
    source: bool,
) -> tuple[Denoiser, EditJob, list[Control]]:
    """What an edit walks with; nothing that speaks against it is found later than here."""
    model, targets = inversion.attached(), targets_of(target, inversion.images)
    carried = plan.source_branch or source
    denoiser = _edit_denoiser(model, inversion, targets, scale, carried, rule)
    denoiser.branches = plan.arrange(denoiser.branches)
    job = EditJob(
        model, inversion, denoiser.layout, targets, inversion.grid, masks_of(mask, inversion)
    )
    controls = [plan.control(job)]
    if job.mask is not None and not plan.masks:
        controls.append(MaskBlend(job))
    return denoiser, job, controls


def _branch(name: str, condition: Condition, inversion: Inversion, scale: float) -> Branch:
    return Branch(name, condition, inversion.negative, scale)


def _edit_denoiser(
    model: Model,
    inversion: Inversion,
    targets: dict[str, tuple[str, ...]],
    scale: float,
    source: bool,
    rule: Guidance | None,
) -> Denoiser:
    branches = [_branch("source", inversion.condition, inversion, scale)] if source else []
    for name, prompts in targets.items():
        condition = model.embed(prompts, size=inversion.size)
        branches.append(_branch(name, condition, inversion, scale))
    return Denoiser(model, branches, guidance=rule)


def _replay(inversion: Inversion, model: Model) -> Replay:
    """How to come back, its state where the model is."""
    replay = way_back(inversion)
    return replace(replay, state=replay.state.map(lambda v: v.to(model.device)))


def _descend(
    replay: Replay,
    inversion: Inversion,
    denoiser: Denoiser,
    start: Start,
    controls: Sequence[Control] = (),
    observers: Sequence[Observer] = (),
) -> Tensor:
    end = walk(
        replay.solver,
        denoiser,
        start.state,
        inversion.grid,
        down=True,
        between=(0, start.depth),
        controls=[replay.control, *controls],
        observers=observers,
        label="return",
    )
    return end.x


def _result(
    model: Model, latents: Tensor, inversion: Inversion, record: dict[str, Any], copies: int = 1
) -> Result:
    placements = placements_in(inversion.record) * copies
    images = decode(model, latents)
    for index, (image, place) in enumerate(zip(images, placements, strict=False)):
        if isinstance(image, Clip) and place.duration is not None:
            images[index] = replace(image, duration=place.duration)
    return Result(images, latents, inversion, record, placements=placements)


def _edit_result(
    model: Model, latents: Tensor, inversion: Inversion, layout: Layout, record: dict[str, Any]
) -> Result:
    edited = torch.cat([latents[layout[name]] for name in layout.targets()])
    source = latents[layout["source"]] if "source" in layout.names else None
    result = _result(model, edited, inversion, record, copies=len(layout.targets()))
    result.source = source
    return result
