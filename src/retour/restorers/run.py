"""`retour.restore`: bring back a picture that was masked, shrunk, blurred or lost its colours.

And `retour.steer`, the same descent on any cost of your own: a classifier's, CLIP's, a critic's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .. import api
from .._inputs import guidance_of, listed, one_canvas, prompts_of
from ..captions import propose
from ..core.branches import Branch, Denoiser
from ..core.loop import Observer, walk
from ..core.model import Ledger, Model
from ..core.path import levels
from ..core.registry import get
from ..core.rows import rms
from ..core.solver import Solver
from ..errors import RetourError, check_finite, check_range, check_seed
from ..io import Placement, canvas_size, read_image, to_image, to_tensor
from ..pictures import Pictures
from ..privacy.classifiers import ClassifierLike, load_classifier
from ..record import describe_run
from .base import RestoreJob
from .flowchef import check_steering
from .operators import Inpaint, Operator, operator_class
from .steering import Classified, Cost, Steer

PINV_CUTOFF = 0.05


@dataclass
class Restoration(Pictures):
    """What came back.

    Attributes:
        images: the restored pictures, at the model's size.
        latents: their latents (B, C, h, w).
        observed: the measurements (B, ...).
        record: facts of the run; `misfit` is each picture's root mean square distance to its
            measurement, on the scale [-1, 1].
        placements: how each picture goes back to its original size (times the operator's scale).
    """

    images: list[Image.Image]
    latents: Tensor
    observed: Tensor
    record: dict[str, Any]
    placements: list[Placement] = field(default_factory=list)


def restore(
    model: api.ModelLike,
    image: Any,
    operator: Operator | str,
    *,
    prompt: str | Sequence[str] | None = None,
    method: str = "flowchef",
    mask: Any = None,
    steps: int | None = None,
    guidance: float = 1.0,
    negative: str = "",
    seed: int = 0,
    project: bool = False,
    **options: Any,
) -> Restoration:
    """Restore degraded pictures with a generative model as the prior.

    Args:
        model: a loaded model, a name, a folder, a hub id or a diffusers pipeline.
        image: a degraded picture: a path, PIL image, array, or tensor (3, H, W); or a list of them
            (one batch); or measurements as they are, a tensor (B, C, H, W) of images in [-1, 1].
        operator: what happened to it, or the name of an operator that needs no more than `mask`.
        prompt: what the picture shows, one for all or one each; "" leaves it to the model. None
            asks the caption proposer about the damaged picture, its hole filled smoothly.
        method: a registered restorer.
        mask: for ``inpaint``, white where the picture is missing, of the picture's size.
        steps: steps of the time grid; None takes the restorer's default.
        guidance: guidance scale; 1 is the prompt alone, which the measurement needs no help to
            follow.
        negative: negative prompt of the guidance.
        seed: seed of all noise.
        project: at last put what was measured back, by the operator's pseudo-inverse: known pixels
            return as they were.
        options: options of the restorer.

    Returns:
        The pictures, with their record.

    Raises:
        RetourError: for input that cannot be used, before any work.

    Reference: that of the restorer, see :func:`retour.cite`.
    """
    model, entry = api.as_model(model), get("restore", method)
    restorer = entry.make(**options)
    api.refuse_impossible(model, entry)
    operator, observed, placements = _observe(model, image, operator, mask)
    if project and not operator.invertible:
        raise RetourError(f"operator {operator.name!r} has no pseudo-inverse: leave project out")
    size = (placements[0].canvas[1], placements[0].canvas[0])
    operator.check(size)
    check_range("guidance", guidance, 0, api.MAX_GUIDANCE)
    if prompt is None:
        prompts = tuple(propose([to_image(p) for p in operator.guess(observed)]))
    else:
        prompts = prompts_of(prompt, len(observed))
    steps = int(entry.facts.get("steps", model.default_steps)) if steps is None else steps
    job = RestoreJob(
        model=model,
        operator=operator,
        observed=observed,
        size=size,
        condition=model.embed(prompts, size=size),
        negative=model.embed([negative] * len(prompts), size=size),
        grid=model.grid(steps, size=size),
        guidance=float(guidance),
        generator=torch.Generator().manual_seed(check_seed("seed", seed)),
    )
    latents = restorer.restore(job)
    check_finite(latents, "the restored latents", "use a smaller kappa or guidance, or more steps")
    with torch.no_grad():
        pixels = model.decode(latents).to(observed)
    if project:
        pixels = pixels + operator.pinv(observed - operator.forward(pixels), PINV_CUTOFF)
    misfit = rms(operator.forward(pixels) - observed)
    asked = {
        "restorer": method,
        "restorer_options": vars(restorer.options),
        "operator": _describe(operator),
        "prompts": list(prompts),
        "prompts_proposed": prompt is None,
        "negative": negative,
        "steps": job.grid.steps,
        "guidance": guidance,
        "seed": seed,
        "project": project,
        "misfit": misfit.tolist(),
    }
    record = describe_run("restore", model, job.ledger, job.images, asked)
    return Restoration([to_image(p) for p in pixels], latents, observed, record, placements)


def steer(
    model: api.ModelLike,
    cost: Cost | Callable[[Tensor], Tensor] | None = None,
    *,
    classifier: ClassifierLike | None = None,
    label: str | int | None = None,
    prompt: str | Sequence[str] = "",
    kappa: float = 0.05,
    inner: int = 1,
    free: int = 0,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str = "",
    seed: int = 0,
    observers: Sequence[Observer] = (),
) -> Restoration:
    """Sample pictures while descending on a cost of what they will become (FlowChef's guidance).

    Nothing is differentiated through the network, only the cost and the decoder.

    Args:
        model: a loaded model, a name, a folder, a hub id or a diffusers pipeline.
        cost: pictures (B, 3, H, W) in [-1, 1] -> costs (B,), differentiable; or a
            :class:`~retour.restorers.steering.Cost` of latents.
        classifier: in the place of a cost: what should see `label`, of which -log p is the cost;
            an embedded classifier's name, a folder, a torch module or a function (see
            :func:`retour.privacy.load_classifier`).
        label: the class, by name or number.
        prompt: one prompt, or one for each picture to make.
        kappa: root mean square of a step on the latents; of a cost that knows its curvature, the
            part of the error that a step removes.
        inner: steps of descent for each answer of the network.
        free: last steps that are left alone.
        size: (height, width); the model's own by default.
        steps: steps of the time grid; None takes the model's default.
        guidance: guidance scale; None: the model's default with a prompt, 1 without.
        negative: negative prompt.
        seed: seed of the noise; every picture has its own.
        observers: callables that see each step.

    Returns:
        One picture for each prompt; the record has their `costs`.

    Raises:
        RetourError: for input that cannot be used, before any work.

    Reference: Patel et al. 2024, arXiv 2412.00100.
    """
    model = api.as_model(model)
    check_steering(kappa, inner, free)
    wanted, judged = _wanted(model, cost, classifier, label)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    size = (model.native, model.native) if size is None else size
    scale = _scale(model, guidance, prompts)
    condition, plain = (model.embed(p, size=size) for p in (prompts, [negative] * len(prompts)))
    shape = model.latent_shape(*size)
    generator = torch.Generator().manual_seed(check_seed("seed", seed))
    noise = torch.randn(len(prompts), *shape, generator=generator, dtype=torch.float64)
    noise = noise.to(model.device)
    grid = model.grid(model.default_steps if steps is None else steps, size=size)
    if free >= grid.steps:
        raise RetourError(f"free is {free}, which leaves none of {grid.steps} steps to steer")
    _, sigma = levels(model.path, grid.times[-1], noise)
    ledger = Ledger()
    branch = Branch("target", condition, plain, scale)
    solver: Solver = get("solver", "ddim").make()
    end = walk(
        solver,
        Denoiser(model, [branch], ledger=ledger),
        solver.start(sigma * noise),
        grid,
        down=True,
        controls=[Steer({"target": wanted}, kappa, inner=inner, free=free)],
        observers=observers,
        label="steer",
    )
    check_finite(end.x, "the steered latents", "use a smaller kappa or guidance, or more steps")
    with torch.no_grad():
        pixels, costs = model.decode(end.x), wanted(end.x)
    asked = {
        "restorer": "flowchef",
        "prompts": prompts,
        "steps": grid.steps,
        "guidance": scale,
        "seed": seed,
        "kappa": kappa,
        "inner": inner,
        "free": free,
        "costs": costs.tolist(),
        **judged,
    }
    record = describe_run("steer", model, ledger, len(prompts), asked)
    canvas = (size[1], size[0])
    placements = [Placement.plan(canvas, canvas)] * len(prompts)
    return Restoration([to_image(p) for p in pixels], end.x, pixels, record, placements)


def _wanted(
    model: Model,
    cost: Cost | Callable[[Tensor], Tensor] | None,
    classifier: ClassifierLike | None,
    label: str | int | None,
) -> tuple[Cost, dict[str, Any]]:
    """The cost of latents that is meant, and what the record says of it."""
    if (cost is None) == (classifier is None) or (classifier is None) != (label is None):
        raise RetourError("steer takes a cost, or a classifier and the label that it should see")
    if isinstance(cost, Cost):
        return cost, {}
    if cost is not None:
        if not callable(cost):
            raise RetourError(f"a cost is a function of pictures, not {type(cost).__name__}")
        return _OfPictures(model, cost), {}
    assert classifier is not None and label is not None
    judge = load_classifier(classifier)
    wanted = Classified(model, lambda images: judge(images / 2 + 0.5), judge.index(label))
    return wanted, {"classifier": judge.name, "label": judge.label(judge.index(label))}


class _OfPictures(Cost):
    """A cost of pictures, asked through the decoder."""

    def __init__(self, model: Model, cost: Callable[[Tensor], Tensor]):
        self.model, self.cost = model, cost

    def __call__(self, x0: Tensor) -> Tensor:
        costs = self.cost(self.model.decode(x0))
        if not isinstance(costs, Tensor) or costs.shape != (len(x0),):
            found = tuple(costs.shape) if isinstance(costs, Tensor) else type(costs).__name__
            raise RetourError(f"a cost gives a number for each of {len(x0)} pictures, not {found}")
        return costs


# --- Input ----------------------------------------------------------------------------------------


def _observe(
    model: Model, image: Any, operator: Operator | str, mask: Any
) -> tuple[Operator, Tensor, list[Placement]]:
    """Operator, float64 measurements (B, ...) on the model's device, and placements."""
    if isinstance(image, Tensor) and image.ndim == 4:
        chosen = _operator(operator, mask, None)
        height, width = (n * chosen.scale for n in image.shape[-2:])
        canvas = (width, height)
        check_finite(image, "the measurements")
        model.latent_shape(height, width)
        observed = image.detach().to(model.device, torch.float64)
        return chosen, observed, [Placement.plan(canvas, canvas)] * len(image)
    sources = listed(image)
    if not sources:
        raise RetourError("there is no image to restore: pass at least one")
    pictures = [read_image(source) for source in sources]
    scale = operator.scale if isinstance(operator, Operator) else operator_class(operator).scale
    large = [(picture.width * scale, picture.height * scale) for picture in pictures]
    multiple = math.lcm(model.multiple, scale)
    canvases = {canvas_size(size, max(model.native, multiple), multiple) for size in large}
    canvas = one_canvas(canvases, "restore")
    if scale > 1:
        _check_large(model, scale, canvas)
    chosen = _operator(operator, mask, canvas)
    small = (canvas[0] // scale, canvas[1] // scale)
    fitted = [p if p.size == small else p.resize(small, Image.Resampling.LANCZOS) for p in pictures]
    pixels = torch.stack([to_tensor(p) for p in fitted]).to(model.device, torch.float64)
    placements = [Placement.plan(size, canvas) for size in large]
    return chosen, chosen.observe(pixels), placements


def _check_large(model: Model, scale: int, canvas: tuple[int, int]) -> None:
    try:
        model.latent_shape(canvas[1], canvas[0])
    except RetourError as error:
        raise RetourError(
            f"with scale {scale} the picture would come back at {canvas[0]} x {canvas[1]} or more, "
            f"but {str(error).partition(',')[0]}: choose a scale that divides {model.native}"
        ) from None


def _operator(operator: Operator | str, mask: Any, canvas: tuple[int, int] | None) -> Operator:
    if isinstance(operator, Operator):
        if mask is not None:
            raise RetourError("an operator knows its own mask: leave mask out, or name 'inpaint'")
        return operator
    cls = operator_class(operator)
    if cls is not Inpaint:
        if mask is not None:
            raise RetourError(f"only 'inpaint' takes a mask, not {operator!r}: leave it out")
        return cls()
    if mask is None:
        raise RetourError("'inpaint' needs a mask, white where the picture is missing (--mask)")
    return Inpaint(_known(mask, canvas))


def _known(mask: Any, canvas: tuple[int, int] | None) -> Tensor:
    """Known pixels (H, W) of a mask that is white where the picture is missing."""
    picture = read_image(mask).convert("L")
    if canvas is not None and picture.size != canvas:
        picture = picture.resize(canvas, Image.Resampling.BOX)
    # What a hole so much as touches is missing; half a grey level is rounding.
    missing = to_tensor(picture.convert("RGB"))[0] > -1 + 1 / 255
    if not bool(missing.any()):
        raise RetourError("the mask is black everywhere: paint white where the picture is missing")
    if bool(missing.all()):
        raise RetourError("the mask is white everywhere: leave black what is known")
    return (~missing).double()


def _scale(model: Model, guidance: float | None, prompts: Sequence[str]) -> float:
    if guidance is None:
        return model.default_guidance if any(p.strip() for p in prompts) else 1.0
    return guidance_of(model, guidance)


def _describe(operator: Operator) -> dict[str, Any]:
    shown = {k: v for k, v in vars(operator).items() if not isinstance(v, Tensor)}
    return {"name": operator.name, **shown}
