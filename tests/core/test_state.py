import json

import pytest
import torch
from safetensors.torch import save_file

import declarations as claims
from problems import PATHS, ProblemModel, mixture, points
from retour.core.grid import flow_grid
from retour.core.registry import get
from retour.core.state import FORMAT, Inversion, State, stack
from retour.errors import RetourError

MODEL = ProblemModel(mixture(), PATHS["flow"], "velocity")


@pytest.fixture
def inversion():
    """Two images inverted by EDICT, with everything that an inversion may carry."""
    grid, x, solver = flow_grid(4), points(2), get("solver", "edict").make()
    states = [solver.start(x)]
    denoise = claims.denoiser(MODEL, 2)
    for step in grid.walk(down=False):
        states.append(solver.step(denoise, states[-1], step, MODEL.path))
    return Inversion(
        method="edict",
        options={"mixing": 0.93, "inversion_guidance": None},
        model_name=MODEL.name,
        fingerprint=MODEL.fingerprint,
        grid=grid,
        states=stack(states),
        condition=MODEL.embed(["red", "green"]),
        negative=MODEL.embed(["", ""]),
        guidance=2.5,
        extras={"offsets": torch.randn(4, 2, 2, 1, 1, generator=torch.Generator().manual_seed(1))},
        record={"nfe": 8, "placements": [{"mode": "stretch"}, {"mode": "pad"}]},
        model=MODEL,
    )


@pytest.fixture
def saved(inversion, tmp_path):
    path = tmp_path / "two.inv"
    inversion.save(path)
    return path


def test_state():
    state = State(points(2), {"y": points(2, seed=1)})
    assert len(state.tile(3).memory["y"]) == 6
    assert torch.equal(state.tile(3).x[2:4], state.x)
    assert torch.equal(state.map(lambda v: v * 2).memory["y"], state.memory["y"] * 2)
    moved = state.with_x(points(2, seed=2))
    assert moved.memory is state.memory


def test_memories_without_a_track_stay_as_they_are():
    state = State(points(2), {"y": points(2, seed=1), "z": points(2, seed=2)})
    track = State(points(2, seed=3), {"y": points(2, seed=4), "w": points(2)})
    found = state.beside(track, torch.add)
    assert torch.equal(found.x, state.x + track.x)
    assert torch.equal(found.memory["y"], state.memory["y"] + track.memory["y"])
    assert found.memory["z"] is state.memory["z"] and "w" not in found.memory


def test_stack_leaves_out_a_history_that_has_just_begun():
    x = points(2)
    named = stack([State(x), State(x, {"x0": x}), State(x, {"x0": x})])
    assert set(named) == {"x"} and named["x"].shape == (3, 2, 2, 1, 1)


def test_ends(inversion):
    assert inversion.images == 2 and inversion.prompts == ("red", "green")
    assert torch.equal(inversion.latents, points(2))
    assert torch.equal(inversion.noise, inversion.states["x"][4])
    assert torch.equal(inversion.end().memory["y"], inversion.states["y"][4])
    assert torch.equal(inversion.at(1).x, inversion.states["x"][1])
    assert torch.equal(inversion.at(1).memory["y"], inversion.states["y"][1])


def test_take_repeats_images(inversion):
    picked = inversion.take([1, 1, 0])
    assert picked.prompts == ("green", "green", "red")
    assert torch.equal(picked.latents, points(2)[[1, 1, 0]])
    assert torch.equal(picked.extras["offsets"], inversion.extras["offsets"][:, [1, 1, 0]])
    assert [p["mode"] for p in picked.record["placements"]] == ["pad", "pad", "stretch"]
    assert len(inversion.record["placements"]) == 2


def test_saving_and_loading_is_bit_equal(inversion, saved):
    again = Inversion.load(saved, MODEL)
    for group in ("states", "extras"):
        ours, theirs = getattr(inversion, group), getattr(again, group)
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
        assert all(ours[k].dtype == theirs[k].dtype for k in ours)
    for group in ("condition", "negative"):
        ours, theirs = getattr(inversion, group), getattr(again, group)
        assert ours.prompts == theirs.prompts
        assert all(torch.equal(ours.tensors[k], theirs.tensors[k]) for k in ours.tensors)
    for name in ("method", "options", "model_name", "fingerprint", "grid", "guidance", "record"):
        assert getattr(inversion, name) == getattr(again, name)
    assert again.model is MODEL


def test_a_loaded_inversion_continues_as_the_live_one(inversion, saved):
    solver = get("solver", "edict").make()
    ends = [
        claims.go(solver, claims.denoiser(MODEL, 2), inv.end(), inv.grid, down=True).x
        for inv in (inversion, Inversion.load(saved))
    ]
    assert torch.equal(*ends)
    assert claims.relative(ends[0], points(2)) < 1e-12


def test_saving_leaves_nothing_half_written(inversion, tmp_path):
    inversion.record["nfe"] = object()  # not JSON
    with pytest.raises(TypeError):
        inversion.save(tmp_path / "bad.inv")
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_refused_by_both_names(saved):
    other = ProblemModel(mixture(), PATHS["flow"], "velocity", rounding=torch.float16)
    other.name = "another"
    with pytest.raises(RetourError) as caught:
        Inversion.load(saved, other)
    for word in ("'problem'", "'another'", MODEL.fingerprint, other.fingerprint, str(saved)):
        assert word in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(RetourError, match="there is no inversion file .*nothing.inv"):
        Inversion.load(tmp_path / "nothing.inv")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.95])
def test_truncated_file(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(RetourError, match="damaged or not an inversion"):
        Inversion.load(saved)


@pytest.mark.parametrize(
    "content", [b"hello", bytes(range(256)) * 9, b"\xff" * 64, b"\x89PNG\r\n\x1a\n" + bytes(64)]
)
def test_garbage(tmp_path, content):
    path = tmp_path / "garbage.inv"
    path.write_bytes(content)
    with pytest.raises(RetourError, match="damaged or not an inversion"):
        Inversion.load(path)


def resave(saved, change_header=None, change_tensors=None, raw=None):
    from safetensors import safe_open

    with safe_open(str(saved), framework="pt") as file:
        header = json.loads(file.metadata()["retour"])
        tensors = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
    if change_header:
        change_header(header)
    if change_tensors:
        change_tensors(tensors)
    save_file(tensors, saved, metadata={"retour": json.dumps(header) if raw is None else raw})


@pytest.mark.parametrize("text", ["null", "[]", '"x"', "{}", '{"format": "other/1"}'])
def test_wrong_format(saved, text):
    resave(saved, raw=text)
    with pytest.raises(RetourError, match=f"not a retour inversion of format {FORMAT}"):
        Inversion.load(saved)


def test_other_safetensors_files(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(RetourError, match="not a retour inversion"):
        Inversion.load(path)


def test_header_that_is_not_json(saved):
    resave(saved, raw="{")
    with pytest.raises(RetourError, match="damaged"):
        Inversion.load(saved)


@pytest.mark.parametrize("name", ["method", "times", "prompts", "record", "guidance"])
def test_header_without_a_part(saved, name):
    resave(saved, change_header=lambda h: h.pop(name))
    with pytest.raises(RetourError, match="lacks parts"):
        Inversion.load(saved)


@pytest.mark.parametrize(
    "name, value",
    [
        ("times", [0.0]),
        ("times", [1, 0, 2, 3, 4]),
        ("times", 3),
        ("times", ["a"] * 5),
        ("prompts", 3),
        ("prompts", [1, 2]),
        ("method", 3),
        ("options", None),
        ("record", None),
        ("guidance", "x"),
        ("guidance", -4),
        ("guidance", float("nan")),
    ],
)
def test_header_with_a_wrong_part(saved, name, value):
    resave(saved, change_header=lambda h: h.update({name: value}))
    with pytest.raises(RetourError, match=r"^'.*two.inv' lacks parts of an inversion \("):
        Inversion.load(saved)


def test_states_that_do_not_fit(saved):
    resave(saved, change_header=lambda h: h.update(times=[0.0, 0.5, 1.0]))
    with pytest.raises(RetourError, match="do not fit"):
        Inversion.load(saved)


def test_other_states_that_do_not_fit(saved):
    resave(saved, change_tensors=lambda t: t.update({"states/y": t["states/y"][:2].clone()}))
    with pytest.raises(RetourError, match="do not fit"):
        Inversion.load(saved)


def test_conditions_that_do_not_fit(saved):
    key = "condition/embeds"
    resave(saved, change_tensors=lambda t: t.update({key: t[key][:1].clone()}))
    with pytest.raises(RetourError, match="do not fit"):
        Inversion.load(saved)


@pytest.mark.parametrize("side", ["condition", "negative"])
def test_conditions_that_are_not_finite_or_not_there(saved, side):
    key = f"{side}/embeds"
    resave(saved, change_tensors=lambda t: t[key].mul_(float("nan")))
    with pytest.raises(RetourError, match="not finite"):
        Inversion.load(saved)
    resave(saved, change_tensors=lambda t: t.pop(key))
    with pytest.raises(RetourError, match="do not fit"):
        Inversion.load(saved)


def test_infinite_states(saved):
    resave(saved, change_tensors=lambda t: t["states/x"].mul_(float("inf")))
    with pytest.raises(RetourError, match="do not fit|NaN or infinite"):
        Inversion.load(saved)


def test_states_missing(saved):
    resave(saved, change_tensors=lambda t: t.pop("states/x"))
    with pytest.raises(RetourError, match="lacks parts"):
        Inversion.load(saved)
