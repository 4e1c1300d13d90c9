import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import retour

ROOT = Path(__file__).parents[1]
MIB = 2**20
PICKLED = {".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin", ".joblib"}


def git_files():
    """Every file that is tracked or about to be, relative to the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    names = filter(None, done.stdout.split("\0"))
    return sorted(Path(name) for name in names if os.path.lexists(ROOT / name))


def size(path):
    return (ROOT / path).lstat().st_size


@pytest.mark.parametrize("module", ["retour", "retour.errors", "retour.io"])
def test_importing_stays_light(module):
    code = f"import sys, {module}; print(*sorted({{n.split('.')[0] for n in sys.modules}}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    assert not {"torch", "diffusers", "transformers", "matplotlib"} & set(done.stdout.split())


def test_the_version_is_one():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    assert retour.__version__ == declared
    assert f"## [{declared}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_installed_version_is_that_of_the_sources():
    try:
        installed = metadata.version("retour")
    except metadata.PackageNotFoundError:
        pytest.skip("retour is not installed, only on the path")
    assert installed == retour.__version__


def test_no_file_is_large():
    assert {name: size(name) for name in git_files() if size(name) > 30 * MIB} == {}


def test_the_embedded_weights_stay_below_their_budget():
    weights = Path("src/retour/weights")
    assert sum(size(name) for name in git_files() if weights in name.parents) < 40 * MIB


def test_no_file_is_a_pickle():
    assert [name for name in git_files() if name.suffix in PICKLED] == []


def test_every_pinned_package_is_pinned_exactly():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.match(r"^[a-z0-9.-]+==[^ ]+( ; .+)?$", line) for line in pins)
    assert "torch==2.13.0" in pins


def test_the_wheel_holds_every_package_file(tmp_path):
    pytest.importorskip("setuptools", "77")
    # A build leaves its traces beside the sources, so it gets a copy of them.
    copy = tmp_path / "source"
    for name in git_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--quiet", "--wheel-dir", tmp_path], cwd=copy, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {info.filename: info.file_size for info in archive.infolist()}
    found = {name: size for name, size in packed.items() if name.startswith("retour/")}
    assert found == expected_in_wheel()


def expected_in_wheel():
    """Package files and their sizes, with what a link leads to in the place of the link."""
    found = {}
    for name in git_files():
        path = ROOT / name
        if name.parts[:2] != ("src", "retour"):
            continue
        files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
        found |= {f.relative_to(ROOT / "src").as_posix(): f.stat().st_size for f in files}
    return found
