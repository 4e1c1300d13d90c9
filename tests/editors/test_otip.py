"""OTIP's direct editing: the plan, the factor it makes, and FlowEdit where it is one."""

import math

import pytest
import torch

from declarations import relative
from editors.test_flowedit import edit, invert, job_of, model, moved_by_means
from retour.core.registry import get
from retour.editors.otip import transport_plan
from retour.errors import RetourError


def factor(sources, targets, u, **options):
    editor = get("edit", "otip").make(**options)
    return editor.control(job_of(invert())).factor(sources, targets, u)


def clouds(count=4, images=2, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    shape = (2, count, images, 3, 4, 4)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def test_strength_one_is_flowedit_bit_for_bit():
    inversion = invert(model(widths=(0.3, 0.2, 0.5)))
    found = edit(inversion, editor="otip")
    assert torch.equal(found.latents, edit(inversion).latents)
    other = edit(inversion, editor="otip", n_avg=3, adaptive=False)
    assert relative(other.latents, edit(inversion, n_avg=3).latents) < 1e-12


@pytest.mark.parametrize("transport", [0.0, 0.4, 1.5])
def test_with_one_noise_the_strength_is_a_factor_on_the_difference(transport):
    """One step from pure noise: the difference is that of the means."""
    inversion = invert(steps=1)
    found = edit(inversion, editor="otip", transport=transport, n_max=1.0)
    assert relative(found.latents, moved_by_means(inversion, transport)) < 1e-12


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_plans_are_transports_on_any_scale(scale):
    """Costs of 1e6 against a regularisation of 0.1 would underflow to 0/0."""
    sources, targets = clouds(scale=scale)
    flat = [x.flatten(2).transpose(0, 1) for x in (sources, targets)]
    cost = torch.cdist(*flat).square()
    plan = transport_plan(cost, 0.1)
    assert torch.isfinite(plan).all() and (plan >= 0).all()
    torch.testing.assert_close(plan.sum(1), torch.full((2, 4), 0.25).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(plan.sum(2), torch.full((2, 4), 0.25).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(plan, transport_plan(cost / scale**2, 0.1))


def test_a_sharp_plan_finds_the_pairs_and_equal_costs_none():
    points = torch.arange(3.0).double()
    cost = (points[:, None] - points[None]).square()[None]
    torch.testing.assert_close(
        transport_plan(cost, 0.01)[0], torch.eye(3).double() / 3, atol=1e-6, rtol=0
    )
    flat = transport_plan(torch.ones(1, 3, 3).double(), 0.1)
    torch.testing.assert_close(flat[0], torch.full((3, 3), 1 / 9).double())
    assert torch.isfinite(transport_plan(torch.zeros(1, 3, 3).double(), 0.1)).all()


def test_plans_equal_plain_sinkhorn_where_that_can_be_computed():
    """Kernel and scalings written out, as in the authors' code, on mild costs."""
    cost = torch.rand(1, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    kernel = torch.exp(-cost[0] / (0.5 * cost.flatten().median()))
    u = v = torch.ones(5).double()
    for _ in range(2000):
        u = 0.2 / (kernel @ v)
        v = 0.2 / (kernel.T @ u)
    wanted = u[:, None] * kernel * v[None]
    torch.testing.assert_close(transport_plan(cost, 0.5)[0], wanted, atol=1e-5, rtol=0)


def test_the_factor_falls_with_the_time_and_with_the_plan_s_entropy():
    sources, targets = clouds()
    far, near = (factor(sources, targets, u) for u in (0.9, 0.1))
    torch.testing.assert_close(near, 9 * far)
    same = sources[:1].expand(4, -1, -1, -1, -1)
    vague = factor(same, same, 0.5, transport=2.0)
    wanted = 2 * 0.5 * math.exp(-math.log(16) / 2)
    torch.testing.assert_close(vague, torch.full_like(vague, wanted))
    paired = factor(100 * sources, 100 * sources + 1e-3, 0.5, transport=2.0, reg=0.001)
    torch.testing.assert_close(
        paired, torch.full_like(paired, 2 * 0.5 * math.exp(-math.log(4) / 2))
    )
    assert factor(sources, targets, 0.5).shape == (2, 1, 1, 1)


def test_the_plan_weakens_the_edit():
    inversion = invert()
    plain = edit(inversion, n_avg=3, n_max=1.0).latents
    weighted = edit(inversion, editor="otip", n_avg=3, n_max=1.0).latents
    change, weaker = (float((x - inversion.latents).norm()) for x in (plain, weighted))
    assert 0 < weaker < change


@pytest.mark.parametrize("options", [{"transport": -1.0}, {"reg": 0.0}, {"n_max": 2.0}])
def test_bad_options(options):
    with pytest.raises(RetourError):
        get("edit", "otip").make(**options)
