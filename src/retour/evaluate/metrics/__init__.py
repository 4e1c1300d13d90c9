"""Metrics of an edit: pure functions of images and masks, and the classes that gather them.

:mod:`.pixelwise` holds the two conventions and what needs no network, :mod:`.structure`,
:mod:`.perceptual` and :mod:`.alignment` what needs one, :mod:`.success` the verdict of whether an
edit happened. A :class:`Metric` gathers the values of one column, each of a :class:`Sample`;
:mod:`.table` holds them all, in `METRICS`, and :class:`Backbones` their networks.

Networks: with the original weights where the user gives them (DINO ViT-B/8, LPIPS, CLIP ViT-L/14),
else what ships with retour, under its own name; such figures compare only with each other.
"""

from .alignment import ClipScorer, region, similarity
from .backbones import Backbones
from .metric import Metric
from .perceptual import CnnTaps, SqueezeTaps, background_distance, perceptual_distance
from .pixelwise import (
    CONVENTIONS,
    Convention,
    decibels,
    exactness,
    mse,
    mse_inside,
    pixels,
    psnr,
    ssim,
)
from .sample import Sample
from .structure import CLIP, EmojiClip, VitKeys, self_similarity, structure_distance
from .success import Jury, Verdict, edit_success
from .table import METRICS, make_metrics

__all__ = [
    "CLIP",
    "CONVENTIONS",
    "METRICS",
    "Backbones",
    "ClipScorer",
    "CnnTaps",
    "Convention",
    "EmojiClip",
    "Jury",
    "Metric",
    "Sample",
    "SqueezeTaps",
    "Verdict",
    "VitKeys",
    "background_distance",
    "decibels",
    "edit_success",
    "exactness",
    "make_metrics",
    "mse",
    "mse_inside",
    "perceptual_distance",
    "pixels",
    "psnr",
    "region",
    "self_similarity",
    "similarity",
    "ssim",
    "structure_distance",
]
