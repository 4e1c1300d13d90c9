import csv
import os
import signal

import pytest
import torch
from torch import nn

from retour.train.loop import (
    Options,
    Trainer,
    grid,
    options_from,
    parser,
    rate,
    replace_folder,
    step_generator,
    write_atomically,
)


class Line:
    """Fit a plane to noisy points; keeps the steps at which it should be interrupted."""

    part = "line"

    def __init__(self, stop_at=None):
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Linear(3, 1)
        for parameter in self.model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        self.stop_at = stop_at

    def loss(self, step, generator):
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        x = torch.randn(8, 3, generator=generator)
        return {"loss": (self.model(x) - x.sum(1, keepdim=True)).square().mean()}

    def picture(self, model):
        return grid(torch.zeros(3, 3, 4, 4), 2)

    def publish(self, model, folder):
        (folder / "weight.txt").write_text(str(model.weight.tolist()))


def options(folder, **changes):
    return Options(**{"out": folder, "steps": 4, "warmup": 2, "log_every": 1, **changes})


def weights(model):
    return [parameter.clone() for parameter in model.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole, half, rest = Line(), Line(stop_at=1), Line()
    average = Trainer(whole, options(tmp_path / "a")).fit()
    Trainer(half, options(tmp_path / "b")).fit()
    resumed = Trainer(rest, options(tmp_path / "b", resume=True))
    average_again = resumed.fit()
    assert resumed.step == 4
    assert not same(weights(half.model), weights(whole.model))
    assert same(weights(rest.model), weights(whole.model))
    assert same(weights(average_again), weights(average))


def test_a_run_leaves_losses_samples_and_the_published_average(tmp_path):
    trainer = Trainer(Line(), options(tmp_path))
    average = trainer.fit()
    rows = list(csv.DictReader((tmp_path / "losses.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert (tmp_path / "line" / "weight.txt").read_text() == str(average.weight.tolist())
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"losses.csv", "samples.png", "line", "checkpoint.pt"}


def test_sigterm_ends_the_run_with_a_checkpoint_and_the_old_handler(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = Trainer(Line(stop_at=1), options(tmp_path, steps=50))
    trainer.fit()
    assert trainer.step == 2
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_time_limit_ends_a_run(tmp_path):
    trainer = Trainer(Line(), options(tmp_path, steps=10**9, minutes=0.001))
    trainer.fit()
    assert 0 < trainer.step < 10**6


@pytest.mark.parametrize(
    ("step", "progress", "value"),
    [(0, 0.0, 0.01), (99, 0.0, 1.0), (500, 0.5, 0.55), (900, 1.0, 0.1)],
)
def test_learning_rate(step, progress, value):
    assert rate(step, progress, warmup=100, floor=0.1) == pytest.approx(value)


def test_step_generators_depend_on_seed_and_step():
    draws = [torch.rand(1, generator=step_generator(*key)) for key in ((0, 1), (0, 2), (1, 1))]
    assert len({float(draw) for draw in draws}) == 3
    assert torch.equal(draws[0], torch.rand(1, generator=step_generator(0, 1)))


def test_failed_writes_leave_what_was_there(tmp_path):
    folder = tmp_path / "model"
    replace_folder(folder, lambda new: (new / "a").write_text("old"))

    def fail(new):
        (new / "a").write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        replace_folder(folder, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "a").read_text() == "old"
    replace_folder(folder, lambda new: (new / "b").write_text("new"))
    assert [path.name for path in folder.iterdir()] == ["b"]
    write_atomically(tmp_path / "file", lambda path: path.write_text("x"))
    assert {path.name for path in tmp_path.iterdir()} == {"model", "file"}


def test_grids_are_row_major_and_white_where_empty():
    images = torch.stack([torch.full((3, 2, 2), value) for value in (0.0, 0.5, 1.0)])
    picture = grid(images, 2)
    assert picture.size == (4, 4)
    assert [picture.getpixel(at) for at in ((0, 0), (2, 0), (3, 3))] == [
        (0, 0, 0),
        (128, 128, 128),
        (255, 255, 255),
    ]


def test_every_option_has_a_flag(tmp_path):
    line = ["--out", str(tmp_path), "--steps", "7", "--no-channels-last", "--bf16"]
    result = options_from(parser("x", lr=0.5).parse_args(line))
    assert result == Options(tmp_path, steps=7, channels_last=False, bf16=True, lr=0.5)
