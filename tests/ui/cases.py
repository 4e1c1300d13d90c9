"""Recipes and a tiny model for the page's tests."""

from __future__ import annotations

from typing import Any

import tiny
from retour.models.diffusers_unet import DiffusersUNet
from retour.ui.desk import Form
from retour.ui.recipe import Recipe

SOURCE, TARGET = "a red apple on a blue background", "a green apple on a blue background"


def recipe(**changes: Any) -> Recipe:
    """Something that the tiny model can make."""
    given: dict[str, Any] = {
        "picture": "in.png", "source": SOURCE, "target": TARGET, "model": "tiny-sd",
        "inverter": "ddim", "editor": "p2p", "steps": 3, "guidance": 3.0,
    }  # fmt: skip
    return Recipe(**{**given, **changes})


def form(**changes: Any) -> Form:
    """The same as a page says it."""
    given: dict[str, Any] = {
        "source": SOURCE, "target": TARGET, "model": "tiny-sd", "editor": "p2p",
        "inverter": "ddim", "steps": 3, "guidance": 3, "seed": 0,
    }  # fmt: skip
    return Form(**{**given, **changes})


def tiny_model() -> DiffusersUNet:
    """A tiny Stable Diffusion."""
    return DiffusersUNet(tiny.sd1(), name="tiny-sd")


class OneModel:
    """A shelf with the tiny model alone."""

    device = dtype = None
    names = ("tiny-sd",)

    def __init__(self) -> None:
        self.model = tiny_model()

    def get(self, name: str) -> DiffusersUNet:
        self.source(name)
        return self.model

    def source(self, name: str) -> str:
        assert name == "tiny-sd"
        return name

    def summary(self, name: str) -> str:
        return ""
