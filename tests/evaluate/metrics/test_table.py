"""The table of metrics: what each says of itself, and how values gather and merge."""

import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from retour.errors import RetourError
from retour.evaluate import metrics
from retour.evaluate.metrics import METRICS, Backbones, Metric, Sample, make_metrics
from retour.evaluate.suite import Suite

OFFLINE = [name for name in METRICS if name != "background_lpips"]


@pytest.fixture(scope="module")
def samples():
    """A copy of the input, a true edit, and something in between, of three kinds."""
    items = Suite.paired().select(["change_object", "change_background", "delete_object"], 3)
    pictures = [items.items[0].image, items.items[1].edited]
    pictures.append(Image.blend(items.items[2].image, items.items[2].edited, 0.5))
    return [Sample.of(item, picture) for item, picture in zip(items, pictures, strict=True)]


@pytest.fixture(scope="module")
def backbones():
    return Backbones()


def test_the_columns_of_a_run():
    assert set(METRICS) == {
        *("background_psnr", "background_mse", "background_ssim", "background_lpips"),
        *("background_perceptual", "structure_distance", "clip_whole", "clip_edited"),
        *("truth_distance", "edit_success", "background_exact"),
    }


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_says_what_it_is(name):
    metric = METRICS[name]
    assert metric.name == name and metric.title and metric.__doc__
    assert metric.better in ("higher", "lower", "closer")
    assert isinstance(metric.unit, str) and isinstance(metric.backbone, str)
    assert isinstance(metric.needs_mask, bool) and isinstance(metric.needs_truth, bool)


def test_no_substitute_goes_by_an_originals_name():
    for name, metric in make_metrics().items():
        said = f"{name} {metric.title} {metric.backbone}".lower()
        assert not any(word in said for word in ("lpips", "dino", "vit-l", "openai"))
    given = make_metrics(backbones=Backbones(lpips="squeeze.pth", clip="a/b-vit", structure="c/d"))
    assert given["background_lpips"].backbone == "LPIPS (SqueezeNet 1.1)"
    assert given["background_perceptual"].backbone == "emoji-cnn perceptual distance"
    assert given["clip_whole"].backbone == given["clip_edited"].backbone == "b-vit"
    assert given["structure_distance"].backbone == "d key structure distance"


def test_lpips_without_weights_is_left_out_or_said():
    assert list(make_metrics()) == OFFLINE
    with pytest.raises(RetourError, match="LPIPS needs weights"):
        make_metrics(["background_lpips"])["background_lpips"].prepare()


@pytest.mark.parametrize("name", OFFLINE)
@pytest.mark.parametrize("convention", metrics.CONVENTIONS)
def test_a_metric_gathers_what_it_measures(name, convention, samples, backbones):
    metric = METRICS[name](convention, backbones)
    metric.prepare()
    assert math.isnan(metric.compute())
    values = metric.update(samples)
    assert len(values) == 3 and all(isinstance(v, float) for v in values)
    one_by_one = METRICS[name](convention, backbones)
    apart = [one_by_one.update([sample])[0] for sample in samples]
    assert values == pytest.approx(apart, rel=1e-5, abs=1e-5, nan_ok=True)
    assert metric.compute() == pytest.approx(np.nanmean(values), nan_ok=True)
    metric.reset()
    assert math.isnan(metric.compute())


def test_the_values_mean_what_the_text_says(samples, backbones):
    found = {n: m.measure(samples) for n, m in make_metrics(backbones=backbones).items()}
    copy, truth, blend = range(3)
    assert found["background_psnr"][copy] == found["background_psnr"][truth] == math.inf
    assert found["background_exact"] == [100, 100, 100]
    assert found["background_ssim"][:2] == pytest.approx([100, 100])
    assert found["structure_distance"][copy] == 0 < found["structure_distance"][blend]
    assert found["truth_distance"][truth] == 0 < found["truth_distance"][copy]
    assert found["edit_success"] == [0, 100, 0]
    sample = samples[blend]
    square = (sample.truth - sample.output).square()[:, sample.edited].mean()
    assert found["truth_distance"][blend] == pytest.approx(1e3 * float(square))


@pytest.mark.parametrize("name", OFFLINE)
def test_what_does_not_apply_is_not_a_number(name, samples, backbones):
    from dataclasses import replace

    metric = METRICS[name](backbones=backbones)
    bare = replace(samples[0], truth=None, edited=None)
    value, known = metric.update([bare, samples[0]])
    assert math.isnan(value) == (metric.needs_truth or metric.needs_mask)
    assert not math.isnan(known)
    everything = replace(samples[0], edited=torch.ones_like(samples[0].edited))
    background = name.startswith("background_")
    assert math.isnan(metric.measure([everything])[0]) == background
    nothing = replace(samples[0], edited=torch.zeros_like(samples[0].edited))
    inside = name in ("clip_edited", "truth_distance", "edit_success")
    assert math.isnan(metric.measure([nothing])[0]) == inside


class Given(Metric):
    name, title = "given", "as given"

    def measure(self, samples):
        return [float(s) for s in samples]


def test_workers_merge_in_any_order_to_the_last_bit():
    rng = np.random.default_rng(0)
    parts = [list(10.0 ** rng.uniform(-8, 8, 50)) for _ in range(4)]
    parts[2][3] = math.nan

    def gather(order):
        whole = Given()
        workers = [Given() for _ in order]
        for worker, k in zip(workers, order, strict=True):
            worker.update(parts[k])
        whole.merge(*workers)
        return whole.compute()

    alone = Given()
    alone.update([v for part in parts for v in part])
    assert gather([0, 1, 2, 3]) == gather([3, 1, 0, 2]) == alone.compute()


def test_infinite_values_stay_infinite():
    metric = Given()
    metric.update([math.inf, 1.0, math.nan])
    assert metric.compute() == math.inf


def test_only_alike_is_merged():
    strict, compat = (METRICS["background_psnr"](c) for c in metrics.CONVENTIONS)
    with pytest.raises(RetourError, match="merge what was measured alike"):
        strict.merge(compat)
    with pytest.raises(RetourError, match="merge what was measured alike"):
        strict.merge(METRICS["background_mse"]())


def test_conventions_are_named_only_where_they_differ():
    made = make_metrics(convention="pie_compat")
    assert made["background_psnr"].describe()["convention"] == "pie_compat"
    assert made["truth_distance"].describe()["convention"] == "strict"
    with pytest.raises(RetourError, match="pie_compat"):
        make_metrics(convention="pie")
    with pytest.raises(RetourError, match="background_psnr"):
        make_metrics(["psnr"])


def test_metrics_travel_without_their_networks(samples):
    made = make_metrics(["clip_whole", "structure_distance"])
    for metric in made.values():
        metric.update(samples)
    sent = pickle.dumps(made)
    assert len(sent) < 5_000
    back = pickle.loads(sent)
    for name, metric in back.items():
        assert metric.compute() == made[name].compute()
        assert metric.update(samples) == made[name].values


def test_inputs_are_brought_to_the_outputs_size():
    item = Suite.paired().items[0]
    sample = Sample.of(item, item.image.resize((32, 48)))
    assert sample.source.shape == sample.output.shape == sample.truth.shape == (3, 48, 32)
    assert sample.edited.shape == (48, 32)
    double = Sample.of(item, item.image.resize((128, 128))).edited
    assert torch.equal(double, torch.from_numpy(item.mask().repeat(2, 0).repeat(2, 1)))
    half = Sample.of(item, item.image.resize((32, 32))).edited
    assert torch.equal(half, torch.from_numpy(item.mask().reshape(32, 2, 32, 2).any((1, 3))))
