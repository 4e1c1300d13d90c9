"""FlowEdit: where it is exact, its formula by hand, its noises, its mask, its last steps."""

import numpy as np
import pytest
import torch

import retour
import tiny
from declarations import error, relative, slope
from problems import ABSENT, PATHS, Mixture, ProblemModel
from retour.core.branches import Branch, Denoiser
from retour.core.grid import flow_grid
from retour.core.registry import get
from retour.errors import RetourError

SIDE = 4
MEANS = {"red": (0.7, -0.6, -0.6), "blue": (-0.6, -0.5, 0.7), "green": (-0.6, 0.6, -0.5)}


class Sure(Mixture):
    """A mixture whose prompts leave the other components out altogether."""

    def log_weights(self, prompt=""):
        logs = super().log_weights(prompt)
        return torch.where(logs > ABSENT, logs, -torch.inf)


def model(path="flow", widths=(0.3, 0.3, 0.3)) -> ProblemModel:
    """Pictures of a colour; a prompt chooses which."""
    means = torch.tensor(list(MEANS.values()), dtype=torch.float64).reshape(3, 3, 1, 1)
    data = Sure(tuple(MEANS), (0.4, 0.3, 0.3), means.expand(3, 3, SIDE, SIDE), widths)
    return ProblemModel(data, PATHS[path], "velocity", native=SIDE)


def picture(seed=0):
    return np.random.default_rng(seed).integers(60, 200, (SIDE, SIDE, 3)).astype(np.uint8)


def invert(m=None, method="virtual", steps=10, prompt="red", **options):
    m = model() if m is None else m
    options = {"guidance": 1.0, **options}
    return retour.invert(m, picture(), prompt, method=method, steps=steps, **options)


def edit(inversion, target="blue", editor="flowedit", mask=None, **options):
    return retour.edit(inversion, target, editor=editor, mask=mask, **options)


def moved_by_means(inversion, part=1.0):
    blue, red = (torch.tensor(MEANS[name], dtype=torch.float64) for name in ("blue", "red"))
    return inversion.latents + part * (blue - red).reshape(1, 3, 1, 1)


# --- Where the answer is known --------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("steps", [1, 3, 10, 28])
def test_gaussians_of_equal_spread_are_moved_by_the_difference_of_their_means(steps, seed):
    inversion = invert(steps=steps)
    result = edit(inversion, n_max=1.0, seed=seed)
    assert relative(result.latents, moved_by_means(inversion)) < 1e-12


@pytest.mark.parametrize("shift", [0.3, 3.15])
def test_and_whatever_the_grid(shift):
    inversion = invert(steps=12)
    inversion.grid = flow_grid(12, shift)
    result = edit(inversion, n_max=1.0, n_avg=2)
    assert relative(result.latents, moved_by_means(inversion)) < 1e-12


def test_the_last_steps_alone_go_part_of_the_way():
    """d' = c (d - (1-s) D) - D from d = 0 at s0: Euler's rule by hand, without any noise."""
    inversion = invert(steps=10)
    shift = moved_by_means(inversion) - inversion.latents
    for n_max in (3, 6):
        d = torch.zeros_like(shift)
        for i in reversed(range(n_max)):
            s, after = inversion.grid.times[i + 1], inversion.grid.times[i]
            c = (s - (1 - s) * 0.09) / ((1 - s) ** 2 * 0.09 + s**2)
            d = d + (after - s) * (c * (d - (1 - s) * shift) - shift)
        result = edit(inversion, n_max=n_max / 10)
        assert relative(result.latents, inversion.latents + d) < 1e-12


@pytest.mark.parametrize("path", ["cosine", "vp", "sub-vp"])
def test_other_paths_move_data_alike(path):
    """From pure noise to clean data, in flow coordinates, whatever the path."""
    m = model(path)
    inversion = invert(m, steps=20)
    clean, noisy = (float(m.path.flow_time(t)) for t in (0.0, inversion.grid.times[-1]))
    result = edit(inversion, n_max=1.0)
    assert clean == 0 and noisy > 0.99
    # What is left of the signal at the noisy end is not known to differ: d = 0 there.
    assert error(result.latents, moved_by_means(inversion)) < 2 * (1 - noisy) + 1e-12


@pytest.mark.parametrize("n_avg", [1, 3])
def test_the_same_prompt_returns_the_data(n_avg):
    inversion = invert(guidance=3.0)
    for seed in (0, 1):
        result = edit(inversion, "red", n_avg=n_avg, n_max=1.0, seed=seed)
        assert relative(result.latents, inversion.latents) < 1e-12


def test_nothing_is_taken_with_n_max_of_nothing():
    inversion = invert()
    result = edit(inversion, n_max=0.0)
    assert torch.equal(result.latents, inversion.latents)
    assert result.record["nfe"] == 0


# --- The formula ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_avg", [1, 2])
def test_the_algorithm_by_hand(n_avg):
    """z in data space, a new noise in every step, the noisiest steps left out."""
    m, steps, n_max = model(widths=(0.3, 0.2, 0.5)), 10, 7
    inversion = invert(m, steps=steps, guidance=2.0)
    options = {"source_guidance": 1.5, "target_guidance": 4.0, "n_avg": n_avg, "seed": 3}
    result = edit(inversion, "blue", n_max=n_max / steps, **options)
    negative = m.embed([""])
    source = Denoiser(m, [Branch("s", m.embed(["red"]), negative, 1.5)])
    target = Denoiser(m, [Branch("t", m.embed(["blue"]), negative, 4.0)])
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(steps, n_avg, 1, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    y, z = inversion.latents, inversion.latents
    for i in reversed(range(n_max)):
        s, after = inversion.grid.times[i + 1], inversion.grid.times[i]
        change = 0
        for e in noise[i]:
            a = (1 - s) * y + s * e
            b = z + a - y
            change = change + (target(b, s).velocity - source(a, s).velocity) / n_avg
        z = z + (after - s) * change
    assert relative(result.latents, z) < 1e-12
    assert torch.equal(result.source, inversion.latents)


def test_the_last_steps_sample_the_target_alone_from_one_fresh_noise():
    m, steps, n_min = model(widths=(0.3, 0.2, 0.5)), 8, 3
    inversion = invert(m, steps=steps)
    result = edit(inversion, "blue", n_max=0.75, n_min=n_min / steps)
    until = edit(invert(m, steps=steps), "blue", n_max=0.75)
    assert error(result.latents, until.latents) > 1e-2
    target = Denoiser(m, [Branch("t", m.embed(["blue"]))])
    source = Denoiser(m, [Branch("s", m.embed(["red"]))])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(steps, 1, 1, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    y, z, times = inversion.latents, inversion.latents, inversion.grid.times
    for i in (5, 4, 3):
        a = (1 - times[i + 1]) * y + times[i + 1] * noise[i, 0]
        b = z + a - y
        v = target(b, times[i + 1]).velocity - source(a, times[i + 1]).velocity
        z = z + (times[i] - times[i + 1]) * v
    x = z - y + (1 - times[3]) * y + times[3] * noise[2, 0]
    for i in (2, 1, 0):
        x = x + (times[i] - times[i + 1]) * target(x, times[i + 1]).velocity
    assert relative(result.latents, x) < 1e-12
    # Only the targets are asked there: 2 rows in three steps, 1 in three.
    assert result.record["nfe"] == 2 * 3 + 3
    assert relative(result.source, y) < 1e-12


def test_all_steps_alone_are_sdedit():
    inversion = invert(steps=6)
    result = edit(inversion, "blue", n_max=0.5, n_min=0.5)
    assert result.record["nfe"] == 3
    assert error(result.latents, inversion.latents) > 1e-2


@pytest.mark.parametrize(("shift", "steps"), [(1.0, 24), (3.0, 18), (3.15, 18)])
def test_by_default_it_begins_at_the_published_time_on_any_grid(shift, steps):
    """Flow time 0.85: 33 of 50 steps shifted by 3, as published, are 18 of 28; unshifted, 24."""
    inversion = invert(steps=28)
    inversion.grid = flow_grid(28, shift)
    assert edit(inversion).record["nfe_edit"] == 2 * steps
    fifty = invert(steps=50)
    fifty.grid = flow_grid(50, 3.0)
    assert edit(fifty).record["nfe_edit"] == 2 * 33


# --- Noises ---------------------------------------------------------------------------------------


def test_every_step_has_its_own_noise_and_the_seed_decides_it():
    m = model(widths=(0.3, 0.2, 0.5))
    inversion = invert(m)
    first, again, other = (edit(inversion, seed=s).latents for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    control = get("edit", "flowedit").make().control(job_of(inversion))
    flat = control.noise.flatten(1)
    assert float((flat @ flat.T / flat.shape[1]).fill_diagonal_(0).abs().max()) < 0.5


def job_of(inversion):
    from retour.core.branches import Layout
    from retour.editors.base import EditJob

    layout = Layout(("source", "target"), 1)
    return EditJob(inversion.model, inversion, layout, {"target": ("blue",)}, inversion.grid)


def test_averaging_lowers_the_variance_over_seeds_as_one_over_n():
    """Over all values of a picture and sixteen seeds."""
    m = model(widths=(0.3, 0.2, 0.5))
    inversion, counts, spreads = invert(m, steps=6), (1, 4, 16), []
    for n_avg in counts:
        runs = [edit(inversion, n_max=1.0, n_avg=n_avg, seed=s).latents for s in range(16)]
        spreads.append(float(torch.stack(runs).var(0).mean()))
    assert abs(slope(counts, spreads) - 1) < 0.2


def test_more_steps_and_more_guidance_change_more():
    m = model(widths=(1.0, 1.0, 1.0))
    inversion = invert(m, guidance=2.0)
    distances = [
        error(edit(inversion, n_max=n).latents, inversion.latents) for n in (0.0, 0.3, 0.6, 1.0)
    ]
    assert distances == sorted(distances) and distances[0] == 0
    distances = [
        error(edit(inversion, target_guidance=w).latents, inversion.latents)
        for w in (2.0, 4.0, 8.0)
    ]
    assert distances == sorted(distances)


# --- With the rest of the library -----------------------------------------------------------------


def test_any_inverter_gives_the_same_edit_and_costs_what_it_costs():
    inversions = [invert(method=n) for n in ("virtual", "euler", "edict", "direct")]
    results = [edit(i, n_max=0.6) for i in inversions[:1]]
    results += [edit(i, n_max=0.6) for i in inversions[1:2] + inversions[3:]]
    for other in results[1:]:
        assert torch.equal(other.latents, results[0].latents)
    assert [r.record["nfe"] for r in results] == [12, 22, 22]
    # A shorter grid has no more steps than it has: EDICT's 8 of 10 hold the 6.
    assert edit(inversions[2], n_max=0.6).record["nfe_edit"] == 12


def test_the_mask_keeps_the_background_exactly():
    mask = np.zeros((SIDE, SIDE))
    mask[:, SIDE // 2 :] = 1
    for options in ({}, {"n_min": 0.2}, {"n_avg": 2}):
        inversion = invert()
        result = edit(inversion, mask=mask, **options)
        gap = (result.latents - inversion.latents).abs()
        assert (
            float(gap[..., : SIDE // 2].max()) < 1e-12 and float(gap[..., SIDE // 2 :].min()) > 1e-3
        )


def test_a_batch_and_several_targets():
    m = model(widths=(0.3, 0.2, 0.5))
    batch = retour.invert(
        m, [picture(0), picture(1)], ["red", "green"], method="virtual", steps=6, guidance=2.0
    )
    both = edit(batch, ["blue", "red"], n_avg=2)
    for k, target in enumerate(("blue", "red")):
        alone = edit(batch.take([k]), target, n_avg=2)
        assert relative(both.latents[k], alone.latents[0]) < 1e-12
    inversion = batch.take([0])
    several = edit(inversion, ["blue", "green"])
    assert len(several.images) == 2
    assert relative(several.latents[1], edit(inversion, "green").latents[0]) < 1e-12


def test_a_distilled_model_is_told_the_scales_and_runs_no_second_row():
    flux = retour.load(tiny.flux())
    inversion = retour.invert(flux, picture(), "a red apple", method="virtual", steps=4)
    heard = []
    network = flux.network
    flux.network = lambda x, t, c: heard.append(c.tensors["guidance"].tolist()) or network(x, t, c)
    result = edit(inversion, "a pear", n_max=0.5, source_guidance=1.5, target_guidance=5.5)
    assert heard == [[1.5, 5.5]] * 2 and result.record["nfe"] == 4
    heard.clear()
    edit(inversion, "a pear", n_max=0.5, target_guidance=2.0)
    assert heard == [[3.5, 2.0]] * 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"n_max": 1.5}, "n_max is 1.5"),
        ({"n_max": 0.5, "n_min": 0.6}, "n_min is 0.6"),
        ({"n_avg": 0}, "n_avg must be at least 1"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(RetourError, match=says):
        get("edit", "flowedit").make(**options)
