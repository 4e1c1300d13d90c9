import pytest
import torch

import declarations as claims
from problems import PATHS, ProblemModel, mixture, points
from retour.core.branches import Branch, Denoiser
from retour.core.guidance import CFG, Interval, Rescaled
from retour.core.path import levels

KINDS = ("eps", "x0", "v", "velocity", "score")
TIME = 0.4


def predictions(kind="eps", path="vp"):
    model = ProblemModel(mixture(), PATHS[path], kind)
    cond, uncond = (claims.denoiser(model, 4, p)(points(), TIME) for p in ("red", ""))
    return cond, uncond, levels(model.path, TIME, points())


def test_scale_one_is_the_conditional_and_zero_the_unconditional():
    cond, uncond, _ = predictions()
    one, zero = (CFG()(cond, uncond, torch.tensor(float(w))) for w in (1, 0))
    assert claims.relative(one.eps, cond.eps) < 1e-14
    assert torch.equal(zero.x0, uncond.x0)


@pytest.mark.parametrize("kind", KINDS)
def test_cfg_is_the_same_in_every_parameterisation(kind):
    """Guiding raw outputs of any kind or both faces: one result."""
    guided = []
    for name in ("eps", kind):
        model = ProblemModel(mixture(), PATHS["vp"], name)
        guided.append(claims.denoiser(model, 4, "red", 7.5)(points(), TIME))
    assert claims.relative(guided[1].x0, guided[0].x0) < 1e-12
    assert claims.relative(guided[1].eps, guided[0].eps) < 1e-12


@pytest.mark.parametrize("rule", [CFG(), Rescaled(), Rescaled(phi=1.0), Interval(0, 1)], ids=repr)
@pytest.mark.parametrize("path", ["vp", "flow", "ve"])
def test_both_faces_still_explain_the_same_latents(rule, path):
    cond, uncond, (alpha, sigma) = predictions(path=path)
    guided = rule(cond, uncond, torch.tensor(7.5))
    assert claims.relative(alpha * guided.x0 + sigma * guided.eps, points()) < 1e-12


def test_rescaled_has_the_conditional_s_spread():
    cond, uncond, _ = predictions()
    guided = Rescaled(phi=1.0)(cond, uncond, torch.tensor(7.5))
    assert torch.allclose(guided.eps.std((1, 2, 3)), cond.eps.std((1, 2, 3)), rtol=1e-12)
    plain = Rescaled(phi=0.0)(cond, uncond, torch.tensor(7.5))
    assert torch.equal(plain.eps, CFG()(cond, uncond, torch.tensor(7.5)).eps)


def test_rescaled_without_a_gap_changes_nothing():
    cond, _, _ = predictions()
    assert torch.equal(Rescaled()(cond, cond, torch.tensor(7.5)).x0, cond.x0)


def test_interval_saves_the_unconditional_evaluations():
    model = ProblemModel(mixture(), PATHS["vp"])
    branch = Branch("source", model.embed(["red"] * 4), model.embed([""] * 4), 7.5)
    rows = {}
    for t in (0.1, 0.5, 0.9):
        denoise = Denoiser(model, [branch], guidance=Interval(0.2, 0.6))
        prediction = denoise(points(), t)
        rows[t] = denoise.ledger.rows
        if t != 0.5:
            assert torch.equal(prediction.eps, claims.denoiser(model, 4, "red")(points(), t).eps)
    assert rows == {0.1: 4, 0.5: 8, 0.9: 4}
