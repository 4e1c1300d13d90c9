r"""Which part of a picture each word of its prompt looks at.

The source returns along its inverted track (N evaluations), and in every layer where image places
attend to words, the probabilities are averaged over steps, layers and heads of one resolution:

.. math:: H_w = \sum_{i \in w} \operatorname{mean}_{steps, layers, heads} M_i \in [0, 1]^{h\times w}

for the tokens i of a word. A place's values over all tokens, the special ones included, sum to one.
UNets and transformers with joint attention alike (there: image queries on text keys). With a target
prompt, the target comes back from the same noise by the inverter's own way, without an editor, and
its words are shown on what it makes (2N evaluations with guidance).

References: Tang et al., "What the DAAM: Interpreting Stable Diffusion Using Cross Attention", 2022,
arXiv 2210.04885; Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", 2022,
arXiv 2208.01626.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from . import api
from ._inputs import listed
from .attention.control import AttentionCall
from .attention.store import AttentionStore
from .core.branches import Branch, Denoiser
from .core.control import Attending
from .core.loop import walk
from .core.model import Ledger, Model, Tokens
from .core.state import Inversion
from .editors._schedules import parse_range
from .editors._track import watch_source
from .editors.align import positions
from .errors import RetourError, check_range, unknown
from .heat import SCALES, Explanation, Panel, Scale
from .inverters.base import way_back
from .io import read_image
from .pictures import placements_in
from .record import describe_run

LEAST_GRID = 16  # Coarser maps say little.
DEFAULT_MODEL, DEFAULT_METHOD = "emoji-unet", "ddim"

Chosen = list[tuple[str, tuple[int, ...]]]


def explain(
    what: Any,
    prompt: str | Sequence[str] | None = None,
    *,
    target: str | Sequence[str] | None = None,
    words: str | Sequence[str] | None = None,
    factor: float | None = None,
    span: str | tuple[float, float] = (0.0, 1.0),
    scale: Scale = "word",
    pictures: Any = None,
    model: api.ModelLike | None = None,
    **options: Any,
) -> Explanation:
    """Show where each word of a prompt looks.

    Args:
        what: an inversion, or one or several pictures.
        prompt: what the pictures show; None asks the caption proposer. An inversion has its own.
        target: one target prompt for all pictures, or one each.
        words: only these words, a text or a list; None shows all.
        factor: how much coarser than the latents the maps shall be, per edge; the nearest that
            the model has is taken. None: a quarter, but 16 x 16 if it can be.
        span: part of the steps that counts, from the noisy end, as fractions: (0, 0.5) or "0-0.5".
        scale: colours from each word's own least to its own largest value (`word`), or from the
            least to the largest of all (`all`).
        pictures: what to draw the source's words on; None takes `what`, or what an inversion's
            latents decode to.
        model: for pictures; a loaded model, a name, a folder, a hub id or a pipeline.
        options: of `retour.invert`, for pictures; its `method` is DDIM by default.

    Raises:
        RetourError: for input that cannot be used, before any work.
    """
    window = check_settings(factor=factor, span=span, scale=scale)
    inversion = _inverted(
        what, prompt, model, options, lambda found: refuse_words(found, target, words)
    )
    live, prompts, chosen = _sought(inversion, target, words)
    ledger, store = Ledger(), _SpanStore(window)
    if pictures is None and what is not inversion:
        pictures = what
    shown = {"source": _drawn_on(pictures, inversion, live)}
    watch_source(live, inversion, [store], ledger)
    if target is not None:
        shown["target"] = _return_to(live, inversion, prompts["target"], store, ledger)
    panels = []
    for (branch, image), found in chosen.items():
        sought = _factor(inversion) if factor is None else factor
        maps = [store.word(branch, image, tokens, sought).cpu() for _, tokens in found]
        labels = tuple(label for label, _ in found)
        picture, text = shown[branch][image], prompts[branch][image]
        panels.append(Panel(branch, image, text, picture, labels, torch.stack(maps)))
    asked = {
        "inverter": inversion.method,
        **{f"{branch}_prompts": texts for branch, texts in prompts.items()},
        "span": list(window),
        "map_size": list(panels[0].maps.shape[1:]),
        "scale": scale,
    }
    record = describe_run("explain", live, ledger, inversion.images, asked)
    return Explanation(panels, scale, {**record, "inversion": inversion.record})


# --- What is asked --------------------------------------------------------------------------------


def check_settings(
    *, factor: float | None, span: str | tuple[float, float], scale: str
) -> tuple[float, float]:
    """Refuse settings that cannot be used, before any work; return the span."""
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    if factor is not None:
        check_range("factor", factor, 1)
    low, high = parse_range(span, "span")
    if low == high:
        raise RetourError(f"span is {span!r}: choose a part of the steps, such as 0-0.5")
    return low, high


def refuse_words(
    inversion: Inversion, target: str | Sequence[str] | None, words: str | Sequence[str] | None
) -> None:
    """Refuse prompts and words that `explain` would, on an inversion or the stand-in of one."""
    _sought(inversion, target, words)


def _sought(
    inversion: Inversion, target: str | Sequence[str] | None, words: str | Sequence[str] | None
) -> tuple[Model, dict[str, list[str]], dict[tuple[str, int], Chosen]]:
    """The model, the prompts of each branch, and the words to show."""
    live = _attentive(inversion)
    prompts = {"source": list(inversion.prompts)}
    if target is not None:
        prompts["target"] = _targets(target, inversion.images)
    return live, prompts, _chosen(live, prompts, words)


def _inverted(
    what: Any,
    prompt: Any,
    model: Any,
    options: dict[str, Any],
    check: Callable[[Inversion], None],
) -> Inversion:
    if not isinstance(what, Inversion):
        options = {"method": DEFAULT_METHOD, "check": check, **options}
        return api.invert(DEFAULT_MODEL if model is None else model, what, prompt, **options)
    given = {"prompt": prompt, "model": model, **options}
    for name in (n for n, value in given.items() if value is not None):
        raise RetourError(f"an inversion has its {name} already: leave it out")
    return what


def _drawn_on(pictures: Any, inversion: Inversion, model: Model) -> list[Image.Image]:
    """The pictures given, or what the inversion's latents decode to."""
    if pictures is None:
        latents = inversion.latents.to(model.device)
        return _restored(inversion, api.decode(model, latents))
    given = listed(pictures)
    if len(given) != inversion.images:
        raise RetourError(f"{len(given)} pictures for {inversion.images} inverted ones: give each")
    return [read_image(picture) for picture in given]


def _restored(inversion: Inversion, pictures: list[Image.Image]) -> list[Image.Image]:
    """Pictures at the sizes of the inputs."""
    places = placements_in(inversion.record)
    if not places:
        return pictures
    return [place.restore(picture) for place, picture in zip(places, pictures, strict=True)]


def _attentive(inversion: Inversion) -> Model:
    """The inversion's model, which must attend to words."""
    model = inversion.attached()
    if "attention" not in model.capabilities:
        raise RetourError(f"model {model.name!r} does not attend to words: use another")
    return model


def _targets(target: str | Sequence[str], images: int) -> list[str]:
    given = [target] * images if isinstance(target, str) else list(target)
    if len(given) != images or not all(isinstance(t, str) and t.strip() for t in given):
        raise RetourError(f"target is {target!r}: give one prompt, or one for each of {images}")
    return given


def _chosen(
    model: Model, prompts: dict[str, list[str]], words: str | Sequence[str] | None
) -> dict[tuple[str, int], Chosen]:
    """(branch, image) -> words to show, each with its tokens.

    Raises:
        RetourError: a word that no prompt holds; nothing to show at all.
    """
    wanted = words.split() if isinstance(words, str) else words
    tokens = {
        (branch, i): model.tokens(text)
        for branch, texts in prompts.items()
        for i, text in enumerate(texts)
    }
    for word in () if wanted is None else wanted:
        if not any(positions(t, word) for t in tokens.values()):
            said = " | ".join(text for texts in prompts.values() for text in texts)
            raise RetourError(f"words names {word!r}, which is not in {said!r}")
    found = {key: some for key, t in tokens.items() if (some := _shown(t, wanted))}
    if not found:
        way_out = "name one" if wanted is not None and not wanted else "the prompts are empty"
        raise RetourError(f"there is no word to show: {way_out}")
    return found


def _shown(tokens: Tokens, wanted: Sequence[str] | None) -> Chosen:
    if wanted is None:
        return [(word.text, word.tokens) for word in tokens.words if word.tokens]
    return [(word, found) for word in wanted if (found := positions(tokens, word))]


def _factor(inversion: Inversion) -> float:
    """A quarter of the latents, but 16 x 16 at least."""
    return max(1.0, min(4.0, min(inversion.latents.shape[-2:]) / LEAST_GRID))


# --- What is watched ------------------------------------------------------------------------------


class _SpanStore(AttentionStore):
    """A store of a part of the steps, at every resolution."""

    def __init__(self, span: tuple[float, float]):
        super().__init__(largest=1.0)
        self.span = span

    def active(self, call: AttentionCall) -> bool:
        """In the steps that count."""
        if call.step is None or not super().active(call):
            return False
        low, high = (round(part * call.step.count) for part in self.span)
        return low <= call.step.position < max(high, low + 1)


def _return_to(
    model: Model, inversion: Inversion, targets: list[str], store: AttentionStore, ledger: Ledger
) -> list[Image.Image]:
    """Come back with the target prompts, watched; return what they make."""
    replay = way_back(inversion)
    wanted = model.embed(targets, size=inversion.size)
    branches = [Branch("target", wanted, inversion.negative, inversion.guidance)]
    if replay.source_branch:
        source = Branch("source", inversion.condition, inversion.negative, inversion.guidance)
        branches.insert(0, source)
    net = Denoiser(model, branches, ledger=ledger)
    end = walk(
        replay.solver,
        net,
        replay.state.map(lambda v: v.to(model.device)).tile(len(branches)),
        inversion.grid,
        down=True,
        controls=[replay.control, Attending(store)],
        label="return",
    )
    return _restored(inversion, api.decode(model, end.x[net.layout["target"]]))
