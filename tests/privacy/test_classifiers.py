"""Classifiers: those that ship with retour, and whatever a user brings."""

import json
import shutil

import pytest
import torch
from torch import nn

import retour
from privacy import cases
from retour.data.scenes import favourites
from retour.demo import examples
from retour.privacy import embedded_classifiers, load_classifier
from retour.privacy._nets import ARCHITECTURES
from retour.privacy.classifiers import (
    CONFIG,
    PREFIX,
    TENSORS,
    WEIGHTS,
    margins,
    predictions,
    write_classifier,
    wrongness,
)

NAMES = sorted(embedded_classifiers())


def images(count=2, size=8):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_two_different_ones_ship():
    assert {"emoji-cnn", "emoji-vit"} <= set(NAMES)
    kinds = {type(load_classifier(name).function) for name in NAMES}
    assert len(kinds) == len(NAMES)


def test_they_are_small_and_no_pickles():
    files = [path for path in WEIGHTS.glob(f"{PREFIX}*/*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    assert sum(path.stat().st_size for path in files) < 3 * 2**20


@pytest.mark.parametrize("name", NAMES)
def test_they_know_the_gallery(name):
    """Every single favourite of the gallery, as it is and at another size."""
    judge = load_classifier(name)
    assert set(judge.labels) == favourites()
    shown = {n: image for n, (image, _) in examples()[0].items() if n in judge.labels}
    assert len(shown) >= 8
    for size in (64, 96):
        pictures = [image.resize((size, size)) for image in shown.values()]
        pixels = torch.stack([retour.io.to_tensor(p) for p in pictures]) / 2 + 0.5
        said = [answer["label"] for answer in predictions(judge, pixels)]
        assert sum(a == b for a, b in zip(said, shown, strict=True)) >= len(shown) - 1


@pytest.mark.parametrize("name", NAMES)
def test_they_differentiate_images_and_nothing_else(name):
    judge, pixels = load_classifier(name), images(2, 64).requires_grad_()
    judge(pixels)[:, 0].sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in judge.function.parameters())
    assert not judge.function.training


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_a_batch_is_judged_as_its_images_are(arch):
    torch.manual_seed(0)
    net, pixels = ARCHITECTURES[arch](5).double(), images(3, 64).double()
    alone = torch.cat([net(p[None]) for p in pixels])
    torch.testing.assert_close(net(pixels), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_writing_and_reading_keep_the_function(arch, tmp_path):
    net = ARCHITECTURES[arch](3).half().float().eval()
    config = {
        "architecture": arch,
        "arguments": {},
        "labels": ["a", "b", "c"],
        "size": 64,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
    }
    write_classifier(net, config, tmp_path / "mine")
    judge = load_classifier(tmp_path / "mine")
    assert (judge.name, judge.labels) == ("mine", ("a", "b", "c"))
    pixels = images(2, 64)
    wanted = net((pixels - 0.5) / 0.25)
    torch.testing.assert_close(judge(pixels), wanted.double())


def test_a_module_is_taken_with_its_size_mean_and_std():
    net = cases.MeanColour()
    options = {"size": 4, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
    judge = load_classifier(net, labels=cases.COLOURS, **options)
    assert judge.name == "MeanColour"
    pixels = images()
    small = pixels[..., ::2, ::2]
    shift, scale = (torch.tensor(options[k])[:, None, None] for k in ("mean", "std"))
    torch.testing.assert_close(judge(pixels), net((small - shift) / scale).double())


def test_a_bare_callable_is_taken():
    judge = load_classifier(lambda x: x.mean((2, 3)))
    assert judge(images()).shape == (2, 3) and judge(images()).dtype == torch.float64
    assert judge.index(2) == judge.index("2") == 2 and judge.label(2) == "2"
    assert load_classifier(judge) is judge


def test_a_module_in_another_dtype_is_met_in_it():
    judge = load_classifier(cases.MeanColour().double())
    assert torch.isfinite(judge(images())).all()


def test_resizing_to_the_nearest_pixel_is_the_default_and_bilinear_an_option():
    seen = {}

    def watch(x):
        seen["x"] = x
        return x.mean((2, 3))

    pixels = images(1, 8)
    load_classifier(watch, size=(4, 8))(pixels)
    assert torch.equal(seen["x"], pixels[..., ::2, :])
    load_classifier(watch, size=(4, 4), resize="bilinear")(pixels)
    assert not torch.equal(seen["x"], pixels[..., ::2, ::2])


def test_modes_of_all_parts_come_back():
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(192), nn.Linear(192, 3))
    net[2].eval()
    judge = load_classifier(net)
    with judge.evaluating():
        assert not any(part.training for part in net.modules())
        first, second = judge(images()), judge(images())
    assert torch.equal(first, second)
    assert [part.training for part in net.modules()] == [True, True, True, False, True]


def test_margins_are_above_zero_where_it_is_wrong():
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 5.0, 2.0]])
    assert wrongness(logits, torch.tensor([0, 0])).tolist() == [-1.0, 2.0]
    judge = load_classifier(lambda x: logits)
    assert margins(judge, images(), torch.tensor([1, 1])) == [2.0, -2.0]
    assert [p["label"] for p in predictions(judge, images())] == ["0", "1"]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: load_classifier("emoji-cmm"), "did you mean 'emoji-cnn'"),
        (lambda: load_classifier("emoji-cnn", size=3), "its own settings, without size"),
        (lambda: load_classifier(3), "not 3"),
        (lambda: load_classifier("emoji-cnn").index("appel"), "did you mean 'apple'"),
        (lambda: load_classifier("emoji-cnn").index(31), "unknown label of 'emoji-cnn' '31'"),
        (lambda: load_classifier("emoji-cnn").index(-1), "unknown label"),
        (lambda: load_classifier(cases.MeanColour()).index("red"), "has no class names"),
        (lambda: load_classifier(lambda x: x)(images()), "must return logits of shape"),
        (lambda: load_classifier(lambda x: [1])(images()), "it returned list"),
    ],
)
def test_bad_input_is_one_sentence(call, says):
    with pytest.raises(retour.RetourError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("harm", ["json", "architecture", "tensors", "labels", "list"])
def test_damaged_folders_are_refused(harm, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(WEIGHTS / f"{PREFIX}cnn", folder)
    config = json.loads((folder / CONFIG).read_text())
    changed = {
        "json": "{",
        "list": "[]",
        "architecture": json.dumps(config | {"architecture": "resnet"}),
        "labels": json.dumps(config | {"labels": ["a"]}),
        "tensors": json.dumps(config),
    }
    (folder / CONFIG).write_text(changed[harm])
    if harm == "tensors":
        (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:1000])
    with pytest.raises(retour.RetourError) as caught:
        load_classifier(folder)
    assert "\n" not in str(caught.value)
