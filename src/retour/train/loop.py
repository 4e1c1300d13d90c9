"""The training loop that every model shares.

All randomness of step n follows from (seed, n), so a run that stops and resumes computes exactly
what an uninterrupted one does. A task says what is particular to a model (`Task`); the loop does
the rest: warm-up and cosine learning rate, gradient clipping, a moving average of the weights
(EMA), checkpoints written to a temporary name and renamed, losses to a CSV file, sample grids to
PNG, and an orderly end at a step count, after some minutes or on SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


@dataclass(frozen=True)
class Options:
    """How to train; both `steps` and `minutes` end the run and its learning-rate schedule."""

    out: Path
    steps: int = 10_000
    minutes: float = math.inf
    batch: int = 16
    lr: float = 1e-3
    warmup: int = 200
    floor: float = 0.02
    weight_decay: float = 0.01
    max_norm: float = 1.0
    ema: float = 0.999
    seed: int = 0
    device: str = "cpu"
    bf16: bool = False
    channels_last: bool = True
    resume: bool = False
    save_every: float = 180.0
    sample_every: float = 300.0
    log_every: int = 20


class Task(Protocol):
    """What a model brings: its module, a loss and a picture of its progress."""

    model: nn.Module
    part: str

    def loss(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Scalars of one batch; "loss" is the one that is minimised."""

    def picture(self, model: nn.Module) -> Image.Image | None:
        """What the averaged model makes now."""

    def publish(self, model: nn.Module, folder: Path) -> None:
        """Write the averaged model to a new folder, which then gets the name `part`."""


def step_generator(seed: int, step: int, device: str = "cpu") -> torch.Generator:
    """The random numbers of one training step."""
    # A CPU generator reads only 32 bits of its seed, so both numbers are hashed into those.
    key = int(np.random.SeedSequence((seed, step)).generate_state(1)[0])
    return torch.Generator(device).manual_seed(key)


def rate(step: int, progress: float, warmup: int, floor: float) -> float:
    """Share of the learning rate: linear warm-up, then a cosine to `floor` at `progress` 1."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return min(1.0, (step + 1) / max(warmup, 1)) * (floor + (1.0 - floor) * cosine)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups: matrices and kernels decay, vectors and scalars do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)` and rename the result to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    write(temporary)
    os.replace(temporary, path)


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary folder beside `folder`, then put that in its place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    fresh.chmod(0o755)
    try:
        write(fresh)
        old = fresh.with_name(fresh.name + ".old")
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


class Trainer:
    """Runs a task with options; `fit` returns the averaged model."""

    def __init__(self, task: Task, options: Options) -> None:
        self.task, self.options = task, options
        task.model.to(options.device)
        if options.channels_last:
            task.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = copy.deepcopy(task.model).eval().requires_grad_(False)
        groups = decay_groups(task.model, options.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), fused=True)
        self.step, self.seconds, self.stopped = 0, 0.0, False
        self.recent: list[dict[str, float]] = []

    @property
    def checkpoint(self) -> Path:
        """Where the state of the run lives."""
        return self.options.out / "checkpoint.pt"

    def save(self) -> None:
        """Write the whole state and publish the average."""
        state = {
            "model": self.task.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        write_atomically(self.checkpoint, lambda path: torch.save(state, path))
        replace_folder(
            self.options.out / self.task.part, lambda path: self.task.publish(self.average, path)
        )

    def restore(self) -> None:
        """Take up the state of `checkpoint`."""
        state = torch.load(self.checkpoint, map_location=self.options.device, weights_only=True)
        self.task.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def progress(self) -> float:
        """Share of the run that is done, by steps or by time, whichever is further."""
        options = self.options
        return max(self.step / options.steps, self.seconds / (60.0 * options.minutes))

    def autocast(self) -> contextlib.AbstractContextManager:
        """bf16 arithmetic where asked for."""
        return torch.autocast(
            self.options.device.split(":")[0], torch.bfloat16, enabled=self.options.bf16
        )

    def train_step(self) -> dict[str, Tensor]:
        """One update of weights and average."""
        options = self.options
        share = rate(self.step, self.progress(), options.warmup, options.floor)
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * share
        with self.autocast():
            terms = self.task.loss(self.step, step_generator(options.seed, self.step))
        terms["loss"].backward()
        nn.utils.clip_grad_norm_(self.task.model.parameters(), options.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.update_average()
        self.step += 1
        return terms

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average towards the weights, faster in the first steps."""
        decay = min(self.options.ema, (1.0 + self.step) / (10.0 + self.step))
        pairs = zip(
            self.average.state_dict().values(), self.task.model.state_dict().values(), strict=True
        )
        kept = [(a, w) for a, w in pairs if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in kept], [w for _, w in kept], 1.0 - decay)

    def log(self, terms: dict[str, Tensor]) -> None:
        """Add the terms of a step to the running means and write these every `log_every` steps."""
        self.recent.append({name: float(value.detach()) for name, value in terms.items()})
        if self.step % self.options.log_every:
            return
        row: dict[str, object] = {"step": self.step, "seconds": round(self.seconds, 1)}
        row |= {name: f"{fmean(past[name] for past in self.recent):.6g}" for name in terms}
        self.recent = []
        append_row(self.options.out / "losses.csv", row)

    def draw(self) -> None:
        """Write the picture of the averaged model."""
        with torch.no_grad():
            picture = self.task.picture(self.average)
        if picture is not None:
            write_atomically(self.options.out / "samples.png", picture.save)

    def fit(self) -> nn.Module:
        """Train until the end that the options set; the averaged model."""
        options = self.options
        options.out.mkdir(parents=True, exist_ok=True)
        if options.resume and self.checkpoint.exists():
            self.restore()
        previous = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stopped", True))
        try:
            self._run()
        finally:
            signal.signal(signal.SIGTERM, previous)
            self.save()
        self.draw()
        return self.average

    def _run(self) -> None:
        saved = drawn = clock = time.monotonic()
        while self.progress() < 1.0 and not self.stopped:
            self.log(self.train_step())
            now = time.monotonic()
            self.seconds, clock = self.seconds + now - clock, now
            if now - saved > self.options.save_every:
                self.save()
                saved = now
            if now - drawn > self.options.sample_every:
                self.draw()
                drawn = now


def append_row(path: Path, row: dict[str, object]) -> None:
    """Add a row to a CSV file, with a header when the file is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def grid(images: Tensor, columns: int) -> Image.Image:
    """A PIL picture of images (B, 3, H, W) in 0..1, row by row."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = torch.ones(rows * columns, 3, height, width)
    sheet[:count] = images.detach().cpu().float().clamp(0, 1)
    sheet = sheet.view(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    pixels = (sheet.reshape(rows * height, columns * width, 3) * 255.0).round().byte().numpy()
    return Image.fromarray(pixels)


def parser(prog: str, **defaults: object) -> argparse.ArgumentParser:
    """Command line of a trainer: --threads and every field of `Options`."""
    result = argparse.ArgumentParser(prog=f"python -m retour.train.{prog}")
    result.add_argument("--threads", type=int, default=0, help="CPU threads, 0: all")
    for field in fields(Options):
        default = defaults.get(field.name, field.default)
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            result.add_argument(flag, action=argparse.BooleanOptionalAction, default=default)
        else:
            kind = Path if field.name == "out" else type(field.default)
            result.add_argument(flag, type=kind, default=default, required=field.name == "out")
    return result


def add_data(result: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options that say which sprites to use."""
    result.add_argument("--data", type=Path, required=True, help="folder of the sprite cache")
    result.add_argument("--concepts", default="core", choices=("core", "all"))
    return result


def options_from(arguments: argparse.Namespace) -> Options:
    """Options of a command line; also sets the threads and the seed of the first weights."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    return Options(**{field.name: getattr(arguments, field.name) for field in fields(Options)})
