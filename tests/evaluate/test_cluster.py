"""The benchmark on a real Ray cluster of this machine: two workers, one of them killed in the run.

Ray not installed skips; Ray that cannot start fails.
"""

from __future__ import annotations

import os
import pickle
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import retour
import tiny
from evaluate import benches
from retour.errors import RetourError
from retour.evaluate import cluster as clusters
from retour.evaluate.batches import batch
from retour.evaluate.engine import Order, Setup
from retour.evaluate.plan import Run, Task
from retour.evaluate.runner import bench
from retour.evaluate.scores import Meter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny-sd"
    tiny.sd1().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def ray(request):
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        # Workers find what this process finds, and start no thread pools of their own.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(retour.__file__).parents[1])]))
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=2,  # Ray takes our word for it, and hands them out as it would real ones.
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=128 * 2**20,
        )
    yield ray
    ray.shutdown()


def own_actors():
    """Process ids of the actors that this process's Ray has started."""
    parents, hands = {}, []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = status.read_text().partition(") ")
            pid = int(status.parent.name)
            parents[pid] = int(rest.split()[1])
            if b"ray::Hand" in (status.parent / "cmdline").read_bytes():
                hands.append(pid)
        except OSError:
            continue

    def mine(pid):
        while pid > 1 and pid != os.getpid():
            pid = parents.get(pid, 0)
        return pid == os.getpid()

    return [pid for pid in hands if mine(pid)]


class Killer(threading.Thread):
    """Kills one worker as soon as the first piece has come back."""

    def __init__(self, out):
        super().__init__(daemon=True)
        self.out, self.killed, self.left = out, None, threading.Event()

    def run(self):
        while not self.left.wait(0.01):
            hands = own_actors() if benches.parts(self.out) else []
            if hands:
                self.killed = hands[0]
                os.kill(self.killed, signal.SIGKILL)
                return


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the workers in /proc")
def test_a_killed_worker_changes_nothing(ray, folder, tmp_path):
    given = {**benches.GIVEN, "inverters": "ddim", "batch": 1}
    local = bench(tmp_path / "local", model=folder, **given)
    out = tmp_path / "cluster"
    killer = Killer(out)
    killer.start()
    there = bench(out, model=folder, cluster="local", workers=2, **given)
    killer.left.set()
    killer.join()
    assert killer.killed is not None and killer.killed not in own_actors()
    assert benches.facts(out) == benches.facts(local.folder)
    assert benches.pictures(out) == benches.pictures(local.folder)
    assert there.plan["runs"] == local.plan["runs"]


@pytest.fixture
def head(monkeypatch):
    """A cluster of another process, as `ray start --head` makes one; it asks for a token."""
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(retour.__file__).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = tempfile.mkdtemp(prefix="ray")  # The names of its sockets must be short.
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    command += [f"--port={port}", "--num-cpus=2", "--num-gpus=0", "--include-dashboard=false"]
    command += [f"--temp-dir={place}", f"--object-store-memory={128 * 2**20}"]
    with Path(place, "said").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
    try:
        until = time.monotonic() + 60
        while "Ray runtime started" not in Path(place, "said").read_text():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.2)
        yield f"127.0.0.1:{port}", Path(place)
    finally:
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(place, ignore_errors=True)


@pytest.mark.slow  # Two Rays start one after the other: 20 seconds.
def test_a_cluster_at_an_address_does_the_same(head, folder, tmp_path):
    address, place = head
    out = tmp_path / "there"
    command = [sys.executable, "-m", "retour", "bench", "--model", folder, "-o", str(out)]
    command += ["--inverters", "ddim", "--editors", "reprompt", "--limit", "2", "--steps", "2"]
    command += ["--batch", "1", "--metrics", "background_psnr", "--threads", "1"]
    done = subprocess.run([*command, "--cluster", address, "--workers", "2"], timeout=120)
    assert done.returncode == 0
    assert list(place.glob("session_2*/logs/worker-*.out"))
    given = {"inverters": "ddim", "editors": "reprompt", "limit": 2, "steps": 2, "batch": 1}
    local = bench(tmp_path / "here", model=folder, metrics="background_psnr", threads=1, **given)
    assert benches.facts(out) == benches.facts(local.folder)
    assert benches.pictures(out) == benches.pictures(local.folder)


# --- What the crew does about its workers, without any --------------------------------------------


class FakeRay:
    """Workers that answer as told: a list of answers or errors, one for each task given out."""

    class exceptions:  # noqa: N801
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            def __init__(self, cause):
                self.cause = cause

    def __init__(self, answers):
        self.answers, self.hired, self.killed, self.given = list(answers), 0, 0, []

        self.pieces = SimpleNamespace(remote=self._give)

    def remote(self, **needs):
        return lambda cls: SimpleNamespace(remote=self._hire)

    def _hire(self, setup):
        self.hired += 1
        return self

    def _give(self, task, cases, todo):
        self.given.append(task.batch)
        return len(self.given), self.answers.pop(0)

    def wait(self, references, num_returns):
        return references[:1], references[1:]

    def get(self, reference):
        if isinstance(reference[1], Exception):
            raise reference[1]
        return [reference[1]]

    def kill(self, hand):
        self.killed += 1


def crew(answers, tasks=2, workers=1):
    """What a crew gives for tasks, and its fake Ray."""
    ray = FakeRay(answers)
    run = Run("ddim+p2p", "ddim", {}, "p2p", {}, 2, 3.0)
    orders = [Order(Task(k, ("a",), (run,)), (), ("ddim+p2p",)) for k in range(tasks)]
    made = clusters._Crew(ray, None, {"num_cpus": 1, "num_gpus": 0}, workers)
    return made.work(orders), ray


def test_a_task_whose_worker_died_is_given_to_another():
    died = FakeRay.exceptions.RayError("killed")
    pieces, ray = crew(["a", died, died, "b"])
    assert list(pieces) == ["a", "b"]
    assert ray.given == [0, 1, 1, 1]
    assert ray.hired == 3 == ray.killed


def test_a_task_that_kills_its_workers_is_given_up():
    died = FakeRay.exceptions.RayError("the memory\nran out")
    pieces, ray = crew([died] * 3)
    with pytest.raises(RetourError, match=r"3 workers died on batch 0 of ddim\+p2p.*ran out"):
        list(pieces)
    assert ray.given == [0, 0, 0]
    assert ray.killed == ray.hired


def test_a_refusal_is_not_tried_again():
    refused = FakeRay.exceptions.RayTaskError(RetourError("no such word"))
    pieces, ray = crew([refused])
    with pytest.raises(RetourError, match="^no such word$"):
        list(pieces)
    assert ray.given == [0] and ray.killed == ray.hired == 1


def test_a_defect_is_not_hidden():
    broken = FakeRay.exceptions.RayTaskError(KeyError("x"))
    with pytest.raises(FakeRay.exceptions.RayTaskError):
        list(crew([broken])[0])


def test_all_workers_are_used_and_let_go():
    pieces, ray = crew(["a", "b", "c"], tasks=3, workers=2)
    assert sorted(pieces) == ["a", "b", "c"]
    assert ray.hired == ray.killed == 2


def test_every_worker_has_a_gpu_of_its_own(ray, monkeypatch):
    class Teller:
        """In the test, since its workers cannot import this file."""

        def __init__(self, setup):
            self.setup = setup

        def pieces(self, task, cases, todo):
            time.sleep(0.2)  # The other one shall not be idle.
            return [(os.getpid(), self.setup.device, os.environ.get("CUDA_VISIBLE_DEVICES"))]

    monkeypatch.setattr(clusters, "Hand", Teller)
    setup = Setup("tiny", "0" * 16, Meter(("background_psnr",)), device="cuda:1")
    run = Run("ddim+p2p", "ddim", {}, "p2p", {}, 2, 3.0)
    orders = [Order(Task(k, ("a",), (run,)), (), ("ddim+p2p",)) for k in range(4)]
    told = list(clusters.cluster(setup)(orders))
    assert len(told) == 4 and {device for _, device, _ in told} == {"cuda"}
    seen = {process: gpu for process, _, gpu in told}
    assert sorted(seen.values()) == ["0", "1"]


def test_there_are_as_many_workers_as_gpus_or_as_cpus_allow():
    def room(cpus, **there):
        fake = SimpleNamespace(cluster_resources=lambda: {"CPU": 8.0, **there})
        return clusters._workers(fake, {"num_cpus": cpus, "num_gpus": int("GPU" in there)})

    assert [room(1), room(3), room(16), room(1, GPU=4.0)] == [8, 2, 1, 4]
    with pytest.raises(RetourError, match="no GPU"):
        room(1, GPU=0.0)


@pytest.mark.parametrize(
    ("cluster", "workers", "said"), [("local", 0, "workers is 0"), (None, 2, "add --cluster")]
)
def test_a_cluster_needs_a_worker_and_workers_a_cluster(folder, tmp_path, cluster, workers, said):
    given = {"model": folder, "cluster": cluster, "workers": workers}
    with pytest.raises(RetourError, match=said):
        bench(tmp_path / "out", **given, **benches.GIVEN)
    with pytest.raises(RetourError, match=said):
        batch(tmp_path, tmp_path / "jobs.csv", tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())


def test_what_a_worker_is_told_can_travel():
    """Networks that the metrics have loaded stay behind."""
    meter = Meter()
    meter.prepare()
    sent = pickle.dumps(meter)
    assert len(sent) < 20_000
    assert pickle.loads(sent).facts() == meter.facts()


def test_without_ray_it_says_what_brings_it(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RetourError, match=r'pip install "retour\[cluster\]"'):
        bench(tmp_path / "out", model=folder, cluster="local", **benches.GIVEN)
