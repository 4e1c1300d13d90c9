"""Every published default of the editing methods, and where ours differs that the method says so.

Numbers of steps, guidance and seed are the model's and the user's. A fraction of the steps stands
for a count: 4 of 50 is 0.08.
"""

import sys

import pytest

from retour.core.registry import get

# (task, method, where published): option -> published value.
PUBLISHED = {
    ("invert", "ddim", "Song et al., as editing code asks"): {"query": "noisy", "strength": 1.0},
    ("invert", "direct", "Ju et al."): {
        "form": "offset", "scale": 1.0, "every": 1, "target_too": False, "inversion_guidance": 1.0,
        "query": "noisy",
    },
    ("invert", "null-text", "Mokady et al."): {
        "inner_steps": 10, "lr": 0.01, "stop": 1e-5, "slack": 2e-5, "variant": "per-step",
        "inversion_guidance": 1.0,
    },
    ("invert", "negative-prompt", "Miyake et al."): {"interpolation": 0.0},
    ("invert", "spdinv", "Li et al. 2024"): {
        "rounds": 25, "lr": 1e-3, "threshold": 5e-6, "weight_decay": 0.01, "search": "adamw",
        "interpolation": 0.0,
    },
    ("invert", "dci", "Li et al. 2025"): {
        "rounds": 5, "correction": 2.0, "lr": 1e-3, "threshold": 5e-6, "norm": "l2",
    },
    ("invert", "virtual", "Xu et al."): {"eta": 1.0, "inversion_guidance": 1.0, "strength": 1.0},
    ("invert", "uniform-maps", "Mo et al."): {
        "quantile": 0.5, "mask_until": 0.2, "dilate": "edit", "clean_source": False,
        "base": "ddim",
    },
    ("invert", "pix2pix-zero", "Parmar et al."): {
        "correlation": 20.0, "divergence": 20.0, "inner": False,
    },
    ("invert", "edit-friendly", "Ju et al.'s benchmark"): {
        "eta": 1.0, "strength": 0.76, "inversion_guidance": 1.0,
    },
    ("edit", "p2p", "Ju et al.'s benchmark"): {
        "cross_steps": 0.4, "self_steps": 0.6, "blend_threshold": 0.3, "blend_start": 0.2,
        "self_max": 0.5,
    },
    ("edit", "masactrl", "Cao et al."): {"start": 0.08, "layers": "fine", "mask_threshold": 0.1},
    ("edit", "pnp", "Tumanyan et al., diffusers' port"): {"features": 0.8, "attention": 0.5},
    ("edit", "pix2pix-zero", "Parmar et al."): {"rate": 0.1, "negative": "source"},
    ("edit", "proximal", "Li et al. 2024"): {
        "prox": "l0", "quantile": 0.7, "pull": 1.0, "pull_last": 0.4, "dilation": 1,
        "cross_steps": 0.8, "self_steps": 0.6, "mode": "refine", "negative": "source",
    },
    ("edit", "infedit", "Xu et al."): {
        "cross_steps": 0.7, "self_steps": 0.7, "edit_threshold": 0.55, "keep_threshold": 0.6,
        "maps": "layout",
    },
}  # fmt: skip

# Where we deviate: published value, and what the module's docstring says about it.
DEVIATIONS = [
    ("invert", "dci", "rescale", False, "``rescale`` keeps that proportion at other sizes"),
    ("invert", "pix2pix-zero", "rolls", "published", "the published code draws it too (``rolls="),
    ("invert", "uniform-maps", "anchor", "returned", '(``anchor="returned"``)'),
    ("edit", "p2p", "mode", "refine", "their benchmark always aligns"),
    ("edit", "masactrl", "source_prompt", "empty", 'set ``source_prompt="empty"``'),
    ("edit", "pix2pix-zero", "push", 1.0, "``push=1`` is as published"),
    ("edit", "pix2pix-zero", "halves", "both", '``halves="both"``'),
    ("edit", "proximal", "push", 1.0, "``push=1`` is the edit's guidance as published"),
    ("edit", "proximal", "each", "number", '``each="number"`` is the paper\'s'),
    ("edit", "proximal", "edited", "step", 'that of the step alone (``edited="step"``)'),
    ("edit", "infedit", "blend_last", False, "``blend_last=False`` is as published"),
    ("edit", "infedit", "elsewhere", "source", '``elsewhere="source"``'),
]


@pytest.mark.parametrize("key", PUBLISHED, ids=lambda key: f"{key[0]}-{key[1]}")
def test_defaults_are_the_published_ones(key):
    task, name, _ = key
    found = vars(get(task, name).options())
    assert {option: found[option] for option in PUBLISHED[key]} == PUBLISHED[key]


@pytest.mark.parametrize(
    ("task", "name", "option", "published", "said"),
    DEVIATIONS,
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_other_defaults_are_owned_up_to(task, name, option, published, said):
    entry = get(task, name)
    assert vars(entry.options())[option] != published
    entry.make(**{option: published})
    text = " ".join((sys.modules[entry.factory.__module__].__doc__ or "").split())
    assert said in text
