import dataclasses

import pytest
import torch

import declarations as claims
from problems import PATHS, ProblemModel, mixture, points
from retour.core.branches import Branch, Denoiser, Layout, Wrapped, rescale
from retour.core.guidance import Interval
from retour.core.model import Condition, Ledger, Model, evaluate

MODEL = ProblemModel(mixture(), PATHS["vp"])


def branch(name, prompts, scale=1.0, uncond=True):
    empty = MODEL.embed([""] * len(prompts)) if uncond else None
    return Branch(name, MODEL.embed(prompts), empty, scale)


SOURCE = branch("source", ["red", "green"])
TARGET = branch("target", ["blue", "blue"], 7.5)


def test_the_problem_is_a_model():
    assert isinstance(MODEL, Model)


def test_rows_are_addressed_by_name():
    denoise = Denoiser(MODEL, [SOURCE, TARGET])
    plan = denoise.plan(0.5)
    rows, condition = plan.rows, plan.condition
    assert [(r.branch, r.half, r.image) for r in rows] == [
        ("target", "uncond", 0),
        ("target", "uncond", 1),
        ("source", "cond", 0),
        ("source", "cond", 1),
        ("target", "cond", 0),
        ("target", "cond", 1),
    ]
    assert condition.prompts == ("", "", "red", "green", "blue", "blue")
    assert rows.conditional() == {
        ("source", 0): 2, ("source", 1): 3, ("target", 0): 4, ("target", 1): 5,
    }  # fmt: skip
    assert plan.reads.tolist() == [2, 3, 0, 1, 2, 3]
    assert rows.where("target").tolist() == [0, 1, 4, 5]
    assert rows.where("target", "cond").tolist() == [4, 5]
    assert rows.where(half="uncond").tolist() == [0, 1]
    assert rows.where().tolist() == list(range(6))
    assert rows.where("nobody").dtype == torch.long


@pytest.mark.parametrize(
    "branches, rows",
    [
        ([SOURCE], 2),
        ([TARGET], 4),
        ([SOURCE, TARGET], 6),
        ([branch("source", ["red", "red"], 3.0), TARGET], 8),
        ([branch("source", ["red", "red"], 3.0, uncond=False)], 2),
        ([branch("source", ["red", "red"], 0.0)], 4),
    ],
)
def test_evaluations_are_counted(branches, rows):
    denoise = Denoiser(MODEL, branches)
    denoise(points(2 * len(branches)), 0.5)
    assert (denoise.ledger.rows, denoise.ledger.calls) == (rows, 1)
    assert denoise.ledger.nfe(2) == rows / 2


def test_each_branch_is_what_it_is_alone():
    x = points(4)
    together = Denoiser(MODEL, [SOURCE, TARGET])(x, 0.3)
    source, target = Denoiser(MODEL, [SOURCE])(x[:2], 0.3), Denoiser(MODEL, [TARGET])(x[2:], 0.3)
    assert claims.relative(together.eps, torch.cat([source.eps, target.eps])) < 1e-14
    assert claims.relative(together.x0, torch.cat([source.x0, target.x0])) < 1e-14


def test_replaced_branches_are_planned_anew():
    denoise = Denoiser(MODEL, [TARGET])
    x = points(2)
    denoise(x, 0.5)
    denoise.branches = rescale(denoise.branches, target=1.0)
    plain = denoise(x, 0.5)
    assert denoise.ledger.rows == 4 + 2
    assert torch.equal(plain.eps, Denoiser(MODEL, [branch("target", ["blue"] * 2)])(x, 0.5).eps)


def test_only_counts_on_the_same_ledger():
    denoise = Denoiser(MODEL, [SOURCE, TARGET])
    part = denoise.only("target")
    assert part.layout.names == ("target",)
    part(points(2), 0.5)
    denoise(points(4), 0.5)
    assert denoise.ledger.rows == 4 + 6


def test_kind_is_the_network_s():
    for kind in ("eps", "velocity"):
        model = ProblemModel(mixture(), PATHS["vp"], kind)
        assert claims.denoiser(model, 1).kind == kind


def test_layout():
    layout = Layout(("source", "a", "b"), 2)
    assert layout["a"] == slice(2, 4)
    assert layout.targets() == ("a", "b")
    x = torch.arange(6)
    assert {n: v.tolist() for n, v in layout.split(x)} == {
        "source": [0, 1],
        "a": [2, 3],
        "b": [4, 5],
    }
    with pytest.raises(ValueError):
        layout["nobody"]
    moved = layout.replaced(x, {"a": torch.tensor([7, 8]), "nobody": x})
    assert moved.tolist() == [0, 1, 7, 8, 4, 5] and x.tolist() == list(range(6))


def test_auxiliary_branches_are_no_targets():
    aide = dataclasses.replace(TARGET, name="layout", auxiliary=True)
    layout = Denoiser(MODEL, [SOURCE, TARGET, aide]).layout
    assert layout.names == ("source", "target", "layout")
    assert layout.targets() == ("target",)


def test_a_time_for_each_row():
    guidance = Interval(0.4, 0.6)
    denoise = Denoiser(MODEL, [SOURCE, TARGET], guidance=guidance)
    x, times = points(4), torch.tensor([0.5, 0.7, 0.5, 0.7], dtype=torch.float64)
    together = denoise(x, times)
    for k, t in enumerate(times.tolist()):
        alone = Denoiser(MODEL, [SOURCE, TARGET], guidance=guidance)(x, t)
        torch.testing.assert_close(together.eps[k], alone.eps[k], rtol=0, atol=1e-14)
        torch.testing.assert_close(together.x0[k], alone.x0[k], rtol=0, atol=1e-14)


def test_wrapped_denoisers_nest_and_pass_on_what_they_wrap():
    denoise = Denoiser(MODEL, [TARGET])
    double = Wrapped(denoise, lambda prediction, x, t: prediction.map(lambda face: 2 * face))
    more = Wrapped(double, lambda prediction, x, t: prediction.map(lambda face: face + t))
    x = points(2)
    assert torch.equal(more(x, 0.5).eps, 2 * denoise(x, 0.5).eps + 0.5)
    assert (more.kind, more.model, more.ledger) == (denoise.kind, MODEL, denoise.ledger)
    assert more.branches is denoise.branches


def test_rescale_by_name():
    source, target = rescale((SOURCE, TARGET), target=2.0)
    assert (source.scale, target.scale) == (1.0, 2.0)
    assert TARGET.scale == 7.5


def test_condition_rows():
    condition = MODEL.embed(["red", "green", "blue"])
    assert len(condition) == 3
    picked = condition.take([2, 0, 0])
    assert picked.prompts == ("blue", "red", "red")
    assert torch.equal(
        picked.tensors["embeds"], MODEL.embed(["blue", "red", "red"]).tensors["embeds"]
    )
    assert condition.tile(2).prompts == condition.prompts * 2
    assert Condition.cat([condition, picked]).prompts == condition.prompts + picked.prompts
    changed = condition.with_tensors(embeds=torch.zeros(3, 1, 3))
    assert changed.prompts == condition.prompts
    assert not torch.equal(condition.tensors["embeds"], changed.tensors["embeds"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_evaluate_answers_in_the_state_s_dtype(dtype):
    x, ledger = points().to(dtype), Ledger()
    prediction = evaluate(MODEL, x, 0.5, MODEL.embed(["red"] * 4), ledger)
    assert (prediction.x0.dtype, prediction.eps.dtype) == (dtype, dtype)
    assert ledger.network_seconds > 0


def test_evaluate_takes_a_time_per_row():
    x, condition = points(), MODEL.embed(["red"] * 4)
    times = torch.tensor([0.1, 0.2, 0.5, 0.9], dtype=torch.float64)
    together = evaluate(MODEL, x, times, condition)
    for i, t in enumerate(times):
        alone = evaluate(MODEL, x[i : i + 1], float(t), condition.take([i]))
        assert claims.relative(together.x0[i : i + 1], alone.x0) < 1e-14


def test_a_part_answers_for_some_images_under_their_own_names():
    seen = []

    class Watched(ProblemModel):
        def network(self, x, t, condition):
            seen.append(denoise.rows)
            return super().network(x, t, condition)

    model = Watched(mixture(), PATHS["vp"])
    prompts = ["red", "green", "blue"]
    branches = [branch("source", prompts), branch("target", prompts[::-1], 7.5)]
    denoise = Denoiser(model, branches)
    x = points(6)
    whole = denoise(x, 0.5)
    part = denoise.part([2, 0])(x[[2, 0, 5, 3]], 0.5)
    assert claims.relative(part.eps, whole.eps[[2, 0, 5, 3]]) < 1e-14
    assert claims.relative(part.x0, whole.x0[[2, 0, 5, 3]]) < 1e-14
    assert [(r.branch, r.image) for r in seen[1]] == [
        (name, image) for name in ("target", "source", "target") for image in (2, 0)
    ]
    assert (denoise.rows, denoise.ledger.rows) == ((), 9 + 6)
