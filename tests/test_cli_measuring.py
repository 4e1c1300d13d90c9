"""`retour bench` and `retour batch` as a user meets them."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pyarrow.parquet as parquet
import pytest
from PIL import Image

import tiny
from evaluate import benches
from retour import cli
from retour.evaluate import runner


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny model on disk."""
    path = tmp_path_factory.mktemp("model") / "tiny-sd"
    tiny.sd1().save_pretrained(path)
    return str(path)


def retour(*arguments: object) -> int:
    """Run in this process; the exit code."""
    return cli.run([str(a) for a in arguments])


SMALL = (
    *("--inverters", "ddim", "--editors", "reprompt,p2p", "--steps", "2", "--limit", "3"),
    *("--batch", "2", "--metrics", "background_psnr,truth_distance"),
)


def test_bench_prints_a_table_and_leaves_a_folder(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert retour("bench", *SMALL, "--model", folder, "-o", out) == 0
    printed = capsys.readouterr()
    assert "3 edits of 'paired', tiny-sd" in printed.out and "| copy-input | inf |" in printed.out
    assert "results.parquet" in printed.err
    assert len(parquet.read_table(out / "results.parquet")) == 4 * 3
    assert "bench" in json.loads((out / "plan.json").read_text())["command"]
    assert retour("bench", *SMALL, "--model", folder, "-o", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"folder", "plan", "summary"}
    assert found["summary"]["runs"]["ddim+p2p"]["nfe_full"]["mean"] == 10


def test_options_reach_their_methods(folder, tmp_path, capsys):
    given = ("-I", "inversion-guidance=2", "-E", "p2p.blend-start=0.4", "--steps", "2,3")
    given += ("--limit", "1", "--guidance", "2", "--kinds", "change_object,add_object")
    code = retour("bench", *SMALL[:4], *given, *SMALL[8:], "--model", folder, "-o", tmp_path / "o")
    plan = json.loads((tmp_path / "o" / "plan.json").read_text()) if code == 0 else None
    assert code == 0, capsys.readouterr().err
    runs = {run["label"]: run for run in plan["runs"]}
    assert set(runs) >= {"ddim+p2p-2", "ddim+p2p-3", "ddim+reprompt-2", "ddim+reprompt-3"}
    assert runs["ddim+p2p-3"]["editor_options"] == {"blend_start": 0.4}
    assert runs["ddim+reprompt-2"]["inverter_options"] == {"inversion_guidance": 2.0}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--steps", "ten"), "whole numbers with commas between, got 'ten'"),
        (("--metrics", "beauty"), "unknown metric 'beauty'"),
        (("--convention", "mine"), "mine"),
        (("--backbone", "ear=x"), "unknown option of '--backbone' 'ear': Choices: clip, lpips,"),
        (("--cache-size", "nan"), "cache-size is nan: choose a number from 0"),
        (("--threads", "0"), "threads is 0: choose a number from 1"),
        (("--seed", "1" + "0" * 30), "choose a whole number below 2^63"),
        (("--suite", "nowhere"), "no mapping_file.json"),
        (("--editors", "p2q"), "unknown editor 'p2q'"),
        (("--pairs", "ddim+infedit"), "the pair 'ddim+infedit' cannot run"),
        (("-I", "fast"), "written KEY=VALUE"),
        (("--model", "no-such"), "unknown model"),
        (("--out", "/proc/x"), "cannot write to '/proc/x'"),
    ],
)
def test_bad_input_ends_with_one_sentence_and_2(folder, tmp_path, capsys, more, message):
    given = ("bench", *SMALL, "--model", folder, "-o", tmp_path / "out")
    assert retour(*given, *more) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("retour: ") and message in said[-1]
    assert not any("Loading weights" in line for line in said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("typed", "address"),
    [
        ([], None),
        (["--cluster"], "local"),
        (["--cluster", "--steps", "2"], "local"),
        (["--cluster", "auto", "--steps", "2"], "auto"),
        (["--cluster", "ray://head:10001"], "ray://head:10001"),
        (["--cluster=auto"], "auto"),
    ],
)
def test_a_cluster_may_have_an_address(tmp_path, monkeypatch, typed, address):
    asked = {}

    def run(out, **given):
        asked.update(given)
        raise SystemExit(0)

    monkeypatch.setattr(runner, "bench", run)
    assert retour("bench", "-o", tmp_path, *typed) == 0
    assert asked["cluster"] == address


@pytest.mark.parametrize("missing", ["pyarrow", "pyarrow.parquet"])
def test_what_is_not_installed_is_said(folder, tmp_path, capsys, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    assert retour("bench", *SMALL, "--model", folder, "-o", tmp_path / "out") == 2
    assert 'pip install "retour[eval]"' in capsys.readouterr().err


def test_batch_edits_what_a_list_says(folder, tmp_path, capsys):
    Image.new("RGB", (20, 16), "red").save(tmp_path / "a.png")
    jobs = tmp_path / "jobs.csv"
    jobs.write_text("image,source,target\na.png,a red cat,a blue cat\na.png,a red cat,a pear\n")
    given = ("batch", tmp_path, "--jobs", jobs, "--model", folder, "--steps", 2)
    assert retour(*given, "-o", tmp_path / "out") == 0
    assert "wrote 2 pictures" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "images").glob("*/*.png"))) == 2
    jobs.write_text("image,target\n../a.png,a cat\n")
    assert retour(*given, "-o", tmp_path / "bad") == 2
    assert "line 2: '../a.png' lies outside" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_itself_can_be_killed_and_goes_on(folder, tmp_path):
    command = [sys.executable, "-m", "retour", "bench", *SMALL, "--model", folder, "-o"]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, whole], check=True, capture_output=True, timeout=300)
    process = subprocess.Popen([*command, out], stdout=subprocess.DEVNULL)
    while len(benches.parts(out)) < 3 and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -9
    done = benches.parts(out)
    assert done and not (out / "results.parquet").exists()
    subprocess.run([*command, out], check=True, capture_output=True, timeout=300)
    assert done.items() <= benches.parts(out).items()
    assert benches.facts(out) == benches.facts(whole)
    assert benches.pictures(out) == benches.pictures(whole)
