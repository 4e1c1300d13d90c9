"""Named colours of scenes and the recolouring of sprites.

Recolouring keeps the shading of a sprite and replaces its paint: a pixel of luminance l becomes a
point on the ramp black -> colour -> white, placed so that the median painted pixel lands on the
named colour itself. Unpainted pixels (eyes, outlines, teeth: low saturation) are left alone, unless
the sprite has hardly any paint, when all of it is tinted.
"""

from __future__ import annotations

import numpy as np

OBJECT_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (226, 40, 44),
    "orange": (248, 138, 28),
    "yellow": (250, 210, 40),
    "green": (52, 168, 72),
    "blue": (40, 98, 226),
    "purple": (140, 70, 200),
    "pink": (246, 120, 180),
}

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "light grey": (200, 204, 210),
    "black": (24, 24, 28),
    "pink": (255, 180, 204),
    "pale yellow": (255, 242, 170),
    "sky blue": (135, 206, 250),
    "dark green": (20, 92, 56),
    "purple": (116, 70, 176),
    "orange": (255, 156, 60),
    "navy blue": (24, 40, 108),
}

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def nearest_background(rgb: np.ndarray) -> str:
    """Name of the background colour closest to `rgb` (3,), 0..255, in Euclidean RGB distance."""
    names = list(BACKGROUNDS)
    table = np.array([BACKGROUNDS[name] for name in names], dtype=np.float32)
    return names[int(np.argmin(((table - np.asarray(rgb, np.float32)) ** 2).sum(-1)))]


def saturation(rgb: np.ndarray) -> np.ndarray:
    """HSV saturation in 0..1 of an image (..., 3) in 0..1."""
    high, low = rgb.max(-1), rgb.min(-1)
    return (high - low) / np.maximum(high, 1e-6)


def paint_weight(rgba: np.ndarray) -> np.ndarray:
    """How much each pixel of a sprite (H, W, 4) in 0..1 counts as paint, (H, W) in 0..1."""
    rgb, alpha = rgba[..., :3], rgba[..., 3]
    chroma = rgb.max(-1) - rgb.min(-1)
    weight = np.clip((np.minimum(saturation(rgb), 2.0 * chroma) - 0.12) / 0.2, 0.0, 1.0)
    covered = (weight * alpha).sum() / max(float(alpha.sum()), 1e-6)
    return np.ones_like(weight) if covered < 0.25 else weight


def ramp(luma: np.ndarray, colour: np.ndarray, middle: float) -> np.ndarray:
    """Colours (..., 3) on black -> `colour` -> white, `colour` itself at luminance `middle`."""
    dark = np.clip(luma / max(middle, 1e-3), 0.0, 1.0)[..., None]
    light = np.clip((luma - middle) / max(1.0 - middle, 1e-3), 0.0, 1.0)[..., None]
    return colour * (0.25 + 0.75 * dark) * (1.0 - 0.6 * light) + 0.6 * light


def recolour(sprite: np.ndarray, name: str) -> np.ndarray:
    """Repaint a sprite (H, W, 4) uint8 with a named colour; alpha and unpainted pixels stay."""
    rgba = sprite.astype(np.float32) / 255.0
    weight = paint_weight(rgba)
    luma = rgba[..., :3] @ _LUMA
    painted = luma[(weight > 0.5) & (rgba[..., 3] > 0.5)]
    middle = float(np.clip(np.median(painted), 0.15, 0.95)) if painted.size else 0.5
    colour = np.array(OBJECT_COLOURS[name], dtype=np.float32) / 255.0
    mixed = weight[..., None] * ramp(luma, colour, middle) + (1 - weight[..., None]) * rgba[..., :3]
    out = sprite.copy()
    out[..., :3] = np.clip(mixed * 255.0 + 0.5, 0, 255).astype(np.uint8)
    return out


def natural_colour(sprite: np.ndarray, share: float = 0.55) -> str | None:
    """The colour name that `share` of a sprite (H, W, 4) uint8 has already, if any."""
    rgba = sprite.astype(np.float32) / 255.0
    solid = rgba[..., 3] > 0.5
    rgb = rgba[..., :3][solid]
    if not len(rgb):
        return None
    names = list(OBJECT_COLOURS)
    table = np.array([OBJECT_COLOURS[name] for name in names], dtype=np.float32) / 255.0
    vivid = (saturation(rgb) > 0.45) & (rgb.max(-1) > 0.45)
    distance = ((rgb[:, None] - table) ** 2).sum(-1)
    close = np.where(vivid & (distance.min(-1) < 0.08), distance.argmin(-1), len(names))
    counts = np.bincount(close, minlength=len(names) + 1)[: len(names)]
    best = int(counts.argmax())
    return names[best] if counts[best] >= share * len(rgb) else None
