"""The fingerprint: stable over reloads and storage types, moved by any training, quick."""

import time

import pytest
import torch

import tiny
from retour.models import fingerprint as module
from retour.models.fingerprint import fingerprint, weight_version
from retour.models.load import load

FAMILIES = sorted(tiny.PIPELINES)


class Part(torch.nn.Module):
    """Parameters of the given shapes, with a config."""

    def __init__(self, *shapes, **config):
        super().__init__()
        self.config = type("Config", (), config)()
        self.weights = torch.nn.ParameterList([torch.randn(shape) for shape in shapes])


@pytest.mark.parametrize("family", FAMILIES)
def test_same_after_a_reload(family, tmp_path):
    pipe = tiny.PIPELINES[family]()
    pipe.save_pretrained(tmp_path)
    assert load(tmp_path).fingerprint == load(pipe).fingerprint


def test_families_differ():
    assert len({load(make()).fingerprint for make in tiny.PIPELINES.values()}) == len(FAMILIES)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_one_changed_weight_is_seen(part):
    pipe = tiny.sd1()
    model = load(pipe)
    before = model.fingerprint
    last = list(getattr(pipe, part).parameters())[-1]
    with torch.no_grad():
        last.view(-1)[-1].add_(1e-6)
    assert model.fingerprint != before


def test_the_noise_levels_and_kind_count():
    prints = {
        load(tiny.sd1(**scheduler)).fingerprint
        for scheduler in ({}, {"beta_end": 0.013}, {"prediction_type": "sample"})
    }
    assert len(prints) == 3


def test_an_optimiser_step_is_seen_in_sampled_models(monkeypatch):
    monkeypatch.setattr(module, "EVERYTHING", 100)
    monkeypatch.setattr(module, "SAMPLE", 50)
    part = Part((40, 40), (3,), ())
    before = fingerprint({"net": part}, {})
    assert before == fingerprint({"net": part}, {})
    version = weight_version({"net": part})
    optimiser = torch.optim.AdamW(part.parameters(), lr=1e-5)
    sum(w.square().sum() for w in part.weights).backward()
    optimiser.step()
    assert fingerprint({"net": part}, {}) != before
    assert weight_version({"net": part}) != version


def test_storage_type_does_not_count_but_rounding_does():
    rounded, narrow = Part((64,)), Part((64,))
    with torch.no_grad():
        rounded.weights[0].copy_(rounded.weights[0].half())
        narrow.weights[0].copy_(rounded.weights[0])
    full = fingerprint({"net": rounded}, {})
    assert fingerprint({"net": narrow.half()}, {}) == full
    assert fingerprint({"net": narrow.to(torch.bfloat16)}, {}) != full


def test_heads_and_facts_count():
    part = Part((4,), num_attention_heads=2)
    before = fingerprint({"net": part}, {"a": 1})
    assert fingerprint({"net": part}, {"a": 2}) != before
    part.config.num_attention_heads = 4
    assert fingerprint({"net": part}, {"a": 1}) != before


def test_it_is_quick():
    part = Part(*[(1000, 1000)] * 20)
    times = []
    for _ in range(3):
        begun = time.process_time()
        fingerprint({"net": part}, {})
        times.append(time.process_time() - begun)
    # 80 MB: a tenth of a second where SHA is in hardware.
    assert min(times) < 0.5
