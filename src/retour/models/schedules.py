"""What a diffusers scheduler's *config* says: noise levels, prediction kind, grid.

Its state is never used. Whatever scheduler a pipeline carries, the grid made here is the one that
`DDIMScheduler` (discrete VP) or `FlowMatchEulerDiscreteScheduler` (flow) of the same config would
walk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core.grid import Grid, discrete_grid
from ..core.path import DiscreteVP
from ..errors import RetourError

KINDS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}

# DDIMScheduler's defaults, for configs that do not name the setting.
PREDICTION = "epsilon"
SPACING = "leading"

# What determines the levels.
LEVEL_SETTINGS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)

# Where alpha-bar ends at exactly 0 its log-SNR is infinite. This instead leaves alpha = 1e-6: below
# the resolution of any network, far above that of the float64 state.
ZERO_SNR_FLOOR = 2.0**-40


def prediction_kind(config: Mapping[str, Any]) -> str:
    """The kind (`eps`, `v` or `x0`) that a discrete model predicts."""
    name = config.get("prediction_type", PREDICTION)
    if name not in KINDS:
        raise RetourError(
            f"the scheduler says prediction_type {name!r}: this model family predicts "
            f"{', '.join(KINDS)}"
        )
    return KINDS[name]


def vp_path(scheduler: Any, kind: str) -> DiscreteVP:
    """The discrete noise path of a scheduler; from its config where it holds no `alphas_cumprod`.

    A zero terminal SNR is kept for models that predict v or x0, with alpha floored at 1e-6.
    """
    table = getattr(scheduler, "alphas_cumprod", None)
    levels = (_from_config(scheduler) if table is None else table).detach().cpu().double()
    if kind == "eps" and float(levels[-1]) <= 0:
        raise RetourError(
            "the scheduler ends at pure noise (rescale_betas_zero_snr) but its model predicts "
            "epsilon, which says nothing about the image there: use v_prediction, or turn it off"
        )
    return DiscreteVP(levels.clamp(min=ZERO_SNR_FLOOR))


def _from_config(scheduler: Any) -> Tensor:
    from diffusers import DDIMScheduler

    config = scheduler.config
    if config.get("trained_betas") is None and "beta_schedule" not in config:
        raise RetourError(
            f"the scheduler {type(scheduler).__name__} tells no noise levels: give the "
            "pipeline one with a beta schedule, such as DDIMScheduler"
        )
    settings = {key: config[key] for key in LEVEL_SETTINGS if key in config}
    levels: Tensor = DDIMScheduler(**settings).alphas_cumprod
    return levels


def vp_grid(config: Mapping[str, Any], steps: int, train_steps: int) -> Grid:
    """The grid of a DDIM scheduler of this config.

    With `linspace` spacing (and `trailing` when `steps` does not divide T) diffusers' own DDIM
    steps to `t - T // N`, which is *not* its next time; here each interval ends where the next one
    begins.
    """
    to_one = config.get("set_alpha_to_one", config.get("final_sigmas_type", "zero") == "zero")
    return discrete_grid(
        steps,
        train_steps,
        spacing=config.get("timestep_spacing", SPACING),
        offset=config.get("steps_offset", 0),
        final=-1.0 if to_one else 0.0,
    )


def flow_shift(scheduler: Any, tokens: int) -> float:
    r"""Factor k of the resolution shift :math:`s' = ks/(1+(k-1)s)` for images of `tokens` patches.

    Static: the config's `shift`. Dynamic: :math:`e^\mu` (or :math:`\mu`, for `time_shift_type`
    "linear") with :math:`\mu` linear in the number of image tokens.
    """
    config = scheduler.config
    if config.get("shift_terminal"):
        raise RetourError(
            "the scheduler stretches its grid to a fixed end (shift_terminal): give it another"
        )
    if not config.get("use_dynamic_shifting", False):
        shift = config.get("shift", config.get("flow_shift"))
        if shift is None:
            raise RetourError(
                f"the scheduler {type(scheduler).__name__} knows no flow: give the pipeline one "
                "that does, such as FlowMatchEulerDiscreteScheduler"
            )
        return float(shift)
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    slope = (config["max_shift"] - config["base_shift"]) / (high - low)
    mu = config["base_shift"] + slope * (tokens - low)
    return mu if config.get("time_shift_type") == "linear" else math.exp(mu)
