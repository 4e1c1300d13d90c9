"""FlowOpt as an editor: from re-prompting towards the source, one iterate after the other."""

import pytest
import torch

import retour
from problems import PATHS, ProblemModel, pictures
from retour.core.registry import get
from retour.core.rows import rms
from retour.editors.flowopt import FlowOptEditor
from retour.errors import RetourError

MODEL = ProblemModel(pictures(8), PATHS["flow"], "velocity", default_steps=10, default_guidance=2.0)


def inversion(count=1, **options):
    generator = torch.Generator().manual_seed(0)
    images = [
        (MODEL.data.means[0] * 0.5 + 0.5 + 0.1 * torch.randn(3, 8, 8, generator=generator)).clamp(
            0, 1
        )
        for _ in range(count)
    ]
    return retour.invert(MODEL, images, "red", method="uniinv", **options)


def edit(inv, target="blue", **options):
    return retour.edit(inv, target, editor="flowopt", **options)


def test_no_iterations_are_reprompting_from_the_partial_level():
    whole = inversion()
    found = edit(whole, iterations=0, strength=0.6)
    part = retour.edit(inversion(strength=0.6), "blue", editor="reprompt")
    torch.testing.assert_close(found.latents, part.latents, rtol=0, atol=1e-12)


def blueness(latents):
    return float((latents[:, 2] - latents[:, 0]).mean())


def test_iterates_come_closer_to_the_source_and_leave_the_target():
    """The paper's trade: distance to the source falls, target score drifts down."""
    inv, seen = inversion(4, guidance=1.0), []
    edit(inv, iterations=10, eta=0.2, monitor=lambda iterate: seen.append(iterate))
    gaps = [float(s.residual.mean()) for s in seen]
    assert all(a > b for a, b in zip(gaps, gaps[1:], strict=False))
    scores = [blueness(s.result) for s in seen]
    assert scores[0] > scores[-1] and scores[0] > 0.5
    last = edit(inv, iterations=10, eta=0.2)
    assert float(rms(last.latents - inv.latents).mean()) < gaps[-1]


def test_ordering_at_equal_evaluations():
    """Closer to the source than re-prompting, at whatever number of steps that spends as much."""
    inv = inversion(4, guidance=1.0)
    found = edit(inv, iterations=8)
    many = inversion(4, steps=int(found.record["nfe"]) // 2, guidance=1.0)
    plain = retour.edit(many, "blue", editor="reprompt")
    near, far = (float((r.latents - inv.latents).norm()) for r in (found, plain))
    assert near < far


def test_stopping_early_returns_that_iterate():
    inv, seen = inversion(), []

    def monitor(iterate):
        seen.append(iterate)
        return iterate.index == 2

    found = edit(inv, monitor=monitor)
    torch.testing.assert_close(found.latents, seen[-1].result, rtol=0, atol=1e-12)
    assert len(seen) == 3


def test_cost_and_record():
    inv = inversion()
    found = edit(inv, iterations=8, eta=0.1)
    assert found.record["nfe_edit"] == 2 * 9 * 9  # guided, 9 of 10 steps, 9 results
    assert len(found.record["residuals"]) == 8 and found.record["eta"] == [0.1]
    assert len(found.record["mean_square"]) == len(found.record["kurtosis"]) == 1
    estimated = edit(inv, iterations=8)
    assert estimated.record["nfe_edit"] == 2 * 9 * 15
    assert get("edit", "flowopt").nfe == "26N"  # 2 x 13/15 N x 15
    assert "2510.22010" in retour.cite(found)


def test_several_targets_and_batches_do_what_each_does_alone():
    inv = inversion()
    both = edit(inv, ["blue", "green"], iterations=3)
    for k, target in enumerate(("blue", "green")):
        alone = edit(inv, target, iterations=3)
        torch.testing.assert_close(both.latents[k], alone.latents[0], rtol=1e-9, atol=1e-9)
    batch = inversion(3)
    whole = edit(batch, iterations=3)
    one = edit(batch.take([1]), iterations=3)
    torch.testing.assert_close(whole.latents[1], one.latents[0], rtol=1e-9, atol=1e-9)


def test_the_mask_confines_it():
    mask = torch.zeros(1, 8, 8)
    mask[..., 4:] = 1
    inv = inversion()
    found = edit(inv, iterations=2, mask=mask)
    assert (found.latents - inv.latents)[..., :4].abs().max() < 1e-9


@pytest.mark.parametrize(
    ("options", "says"),
    [({"strength": 1.5}, "strength is 1.5"), ({"iterations": -1}, "iterations is -1")],
)
def test_options_are_checked(options, says):
    with pytest.raises(RetourError, match=says):
        FlowOptEditor(get("edit", "flowopt").options(**options))
