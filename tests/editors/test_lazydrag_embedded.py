"""LazyDrag's proofs on the embedded model: a small DragBench with exact answers. Slow."""

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import retour
from retour.editors._drags import Drag
from retour.evaluate.drag import Patches
from retour.evaluate.metrics import pixels, psnr
from retour.evaluate.suite import Suite

STEPS, COUNT = 20, 4
RED, BLUE, GROUND = (222, 46, 66), (85, 172, 238), (255, 233, 160)
NOISE_ONLY = {"background": False, "identity_until": 0.0, "blend_max": 0.0}

pytestmark = pytest.mark.slow


@cache
def model():
    return retour.load("emoji-mmdit")


# --- Two balls pulled apart -----------------------------------------------------------------------

WAYS = [((22, 32), (22, 14)), ((42, 32), (42, 50))]
BALLS = "a flat twemoji drawing of a red circle to the left of a blue circle on a yellow background"


def balls(places):
    """Two discs of radius 9 around (x, y)."""
    large = Image.new("RGB", (256, 256), GROUND)
    draw = ImageDraw.Draw(large)
    for (x, y), colour in zip(places, (RED, BLUE), strict=True):
        draw.ellipse([4 * (v + 0.5) + r for r in (-36, 36) for v in (x, y)], fill=colour)
    return large.resize((64, 64), Image.Resampling.BOX)


def centres(image):
    """(x, y) of the red and of the blue ball; the picture's middle where there is none."""
    found, levels = [], np.asarray(image).astype(float)
    for sign in (1, -1):
        share = np.clip(sign * (levels[..., 0] - levels[..., 2]) - 60, 0, None)
        # The ground is reddish too: what is the ground's colour does not count.
        share = share * (np.abs(levels - GROUND).max(-1) > 60)
        down, across = np.indices(share.shape)
        total = max(share.sum(), 1e-9)
        found.append(((across * share).sum() / total, (down * share).sum() / total))
    return np.array(found)


@cache
def pulled_apart(**options):
    start, goal = zip(*WAYS, strict=True)
    before = balls(start)
    mask = Image.fromarray(np.abs(np.asarray(before).astype(int) - GROUND).max(-1) > 20)
    drags = [Drag(a, b) for a, b in WAYS]
    result = retour.drag(
        model(), before, drags, prompt=BALLS, mask=mask, mode="move", steps=STEPS, **options
    )
    return float(np.linalg.norm(centres(result.image) - goal, axis=1).mean())


def test_centres_are_found_where_they_were_drawn():
    for places in (list(zip(*WAYS, strict=True))[0], list(zip(*WAYS, strict=True))[1]):
        assert np.abs(centres(balls(places)) - places).max() < 0.5


def test_two_balls_arrive_which_the_average_of_their_drags_keeps_together():
    ours, average = pulled_apart(), pulled_apart(field="average")
    print("centroid error", ours, "average", average, "no control", pulled_apart(**NOISE_ONLY))
    assert ours < 4 < 18
    assert ours < average / 2


# --- Objects of the paired set --------------------------------------------------------------------


@cache
def cases():
    found = []
    for item in Suite.paired().select(kinds=["change_position"], limit=COUNT):
        areas = [area_of(image) for image in (item.image, item.edited)]
        down, right = np.argwhere(areas[1]).min(0) - np.argwhere(areas[0]).min(0)
        inner = np.argwhere(areas[0]).mean(0)
        y, x = (float(round(v)) for v in inner)
        found.append((item, areas[0], Drag((x, y), (x + float(right), y + float(down)))))
    return found


def area_of(image):
    levels = np.asarray(image).astype(int)
    ground = np.median(levels.reshape(-1, 3), 0)
    return np.abs(levels - ground).max(-1) > 0


@cache
def inversion():
    items = [c[0] for c in cases()]
    return retour.invert(
        model(), [i.image for i in items], [i.source for i in items],
        method="uniinv", steps=STEPS, guidance=1.0,
    )  # fmt: skip


@cache
def measured(**options):
    """Mean distance in pixels, PSNR to the truth, and to the source where nothing may change."""
    items, areas, drags = zip(*cases(), strict=True)
    result = retour.edit(
        inversion(), [i.source for i in items], editor="lazydrag", mode="move",
        mask=[Image.fromarray(a) for a in areas], drags=[[d] for d in drags], **options,
    )  # fmt: skip
    rows = []
    for k, (item, drag) in enumerate(zip(items, drags, strict=True)):
        before, after, found = (
            pixels(p) for p in (item.image, item.edited, result.original_size(k))
        )
        way = Patches().distances(after, found, [drag.end], [drag.end])[0]
        rows.append((way, psnr(after, found), psnr(before, found, item.mask())))
    return torch.tensor(rows).mean(0).tolist()


def test_cells_arrive_nearer_and_truer_than_tokens():
    """Tokens of 8 pixels round every move to their own grid."""
    ours, tokens = measured(), measured(reading="tokens")
    print("carried", ours, "tokens", tokens)
    assert ours[0] < tokens[0] and ours[1] > tokens[1] + 1


def test_attention_adds_to_moved_noise():
    """From noise; from half of the way the start itself says nearly all."""
    ours, noise = measured(strength=1.0), measured(strength=1.0, **NOISE_ONLY)
    print("full", ours, "noise alone", noise)
    assert ours[1] > noise[1]
