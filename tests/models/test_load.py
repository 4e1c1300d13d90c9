"""Loading: folders, names, objects; what is refused and how; nothing heavy on import."""

import json
import subprocess
import sys

import pytest
import torch

import tiny
from retour.errors import RetourError
from retour.models import load as loading
from retour.models.load import embedded, load

FACTS = {"default_steps": 12, "default_guidance": 2.5, "summary": "a tiny model"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-unet"
    tiny.sd1().save_pretrained(path)
    return path


@pytest.fixture
def weights(tmp_path, monkeypatch, folder):
    """A weights folder with one embedded model that has facts of its own."""
    (tmp_path / "tiny-unet").mkdir()
    for part in folder.iterdir():
        (tmp_path / "tiny-unet" / part.name).symlink_to(part)
    (tmp_path / "tiny-unet" / "retour.json").write_text(json.dumps(FACTS))
    (tmp_path / "clip").mkdir()
    monkeypatch.setattr(loading, "WEIGHTS", tmp_path)
    return tmp_path


def test_importing_and_listing_is_light():
    code = (
        "import sys; from retour.models.load import embedded, load; embedded();"
        "print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_folder(folder):
    model = load(folder)
    twin = load(tiny.sd1())
    assert (model.name, model.default_steps, model.default_guidance) == ("tiny-unet", 50, 7.5)
    assert model.fingerprint == twin.fingerprint
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in model.net.parameters())
    assert not any(m.training for m in model.net.modules())
    x, t = torch.zeros(1, 4, 8, 8), torch.tensor([500.0])
    condition = model.embed(["a red apple"])
    assert torch.equal(model.network(x, t, condition), twin.network(x, t, condition))


def test_half_precision_on_a_cpu_says_nothing(folder, capfd):
    load(folder, dtype="float16", device="cpu")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_other_families_from_a_folder(family, tmp_path):
    pipe = tiny.PIPELINES[family]()
    pipe.save_pretrained(tmp_path)
    model = load(str(tmp_path), dtype="bfloat16")
    adapters = {"sdxl": "DiffusersUNet", "sd3": "DiffusersSD3", "flux": "DiffusersFlux"}
    assert type(model).__name__ == adapters[family]
    assert model.net.dtype == torch.bfloat16
    assert model.embed(["a cat"]).tensors["embeds"].dtype == torch.bfloat16


def test_shy_vaes_are_kept_in_float32(tmp_path):
    tiny.sdxl().save_pretrained(tmp_path)
    model = load(tmp_path, dtype=torch.float16)
    assert (model.net.dtype, model.pipe.vae.dtype) == (torch.float16, torch.float32)


def test_a_folder_of_a_variant(tmp_path):
    pipe = tiny.sd1()
    pipe.to(torch.float16)
    pipe.save_pretrained(tmp_path, variant="fp16")
    model = load(tmp_path)
    assert model.net.dtype == torch.float32
    assert model.fingerprint == load(pipe).fingerprint


def test_embedded_models_bring_their_facts(weights):
    listed = embedded()
    assert list(listed) == ["tiny-unet"]
    assert FACTS.items() <= listed["tiny-unet"].items()
    assert listed["tiny-unet"]["pipeline"] == "StableDiffusionPipeline"
    assert listed["tiny-unet"]["bytes"] > 4 * 69_908
    model = load("tiny-unet")
    assert (model.name, model.default_steps, model.default_guidance) == ("tiny-unet", 12, 2.5)


def test_the_models_that_come_with_retour():
    for name, facts in embedded().items():
        model = load(name, device="cpu", dtype="float32")
        assert model.name == name and facts["bytes"] < 40 * 2**20
        latents = model.encode(torch.zeros(2, 3, model.native, model.native))
        times = torch.full((2,), 0.5 * model.path.t_noise)
        out = model.network(latents, times, model.embed(["a red apple", ""]))
        assert out.shape == latents.shape and bool(out.isfinite().all())
        assert model.decode(latents).shape == (2, 3, model.native, model.native)


def test_no_t5_rows_where_the_facts_say_so(tmp_path):
    tiny.sd3().save_pretrained(tmp_path)
    (tmp_path / "retour.json").write_text(json.dumps({"t5_tokens": 0}))
    model = load(tmp_path)
    assert model.embed(["a cat"]).tensors["embeds"].shape == (1, tiny.TOKENS, 2 * tiny.WIDTH)
    assert len(model.tokens("a cat").ids) == tiny.TOKENS


def test_facts_of_flux(tmp_path):
    tiny.flux().save_pretrained(tmp_path)
    assert load(tmp_path).native == 256  # 128 latents, the pipeline's own, of 2 pixels each
    facts = {"native": 16, "t5_tokens": 8, "embedded_guidance": 2.0, "default_guidance": 1.5}
    (tmp_path / "retour.json").write_text(json.dumps(facts))
    model = load(tmp_path)
    condition = model.embed(["a cat"])
    assert (model.native, model.default_guidance) == (16, 1.5)
    assert condition.tensors["embeds"].shape[1] == 8
    assert condition.tensors["guidance"].tolist() == [2.0]


def test_compile_wraps_and_leaves_the_module(monkeypatch):
    calls = []
    monkeypatch.setattr(
        torch, "compile", lambda net: lambda *a, **k: calls.append(1) or net(*a, **k)
    )
    pipe = tiny.sd1()
    model = load(pipe, compile=True)
    model.network(torch.zeros(1, 4, 8, 8), torch.tensor([3.0]), model.embed(["a cat"]))
    assert calls == [1] and model.net is pipe.unet
    assert model.attention_sites()


def test_unknown_names(weights):
    with pytest.raises(RetourError, match="unknown model 'tiny-unt': did you mean 'tiny-unet'"):
        load("tiny-unt")


def test_hub_ids_without_a_connection(weights):
    with pytest.raises(RetourError, match=r"cannot get 'nobody/nothing'.*tiny-unet\)$"):
        load("nobody/nothing")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("/no/such/folder", "no folder '/no/such/folder'"),
        ("./nothing", "no folder './nothing'"),
        ("model.ckpt", "single file"),
        ("folder/model.safetensors", "single file"),
        (3, "pipeline, not int"),
        (torch.nn.Linear(1, 1), "pipeline, not Linear"),
    ],
)
def test_refused_sources(given, message):
    with pytest.raises(RetourError, match=message):
        load(given)


def test_folders_that_are_no_pipelines(tmp_path):
    with pytest.raises(RetourError, match=r"has no model_index\.json"):
        load(tmp_path)
    index = tmp_path / "model_index.json"
    for text, message in [
        ("{", "cannot be read as JSON"),
        ("[]", "does not hold a JSON object"),
        ("{}", "does not name a pipeline class"),
        ('{"_class_name": "PixArtSigmaPipeline"}', "unknown kind of .*PixArtSigmaPipeline"),
    ]:
        index.write_text(text)
        with pytest.raises(RetourError, match=message):
            load(tmp_path)


def _copy(folder, target, part, change):
    for file in folder.rglob("*"):
        if file.is_file():
            copy = target / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    for file in (target / part).glob("*.safetensors"):
        change(file)


def test_pickles_are_refused(folder, tmp_path):
    _copy(folder, tmp_path, "unet", lambda file: file.rename(file.with_suffix(".bin")))
    with pytest.raises(RetourError, match=r"unet' offers its weights only as \.bin files"):
        load(tmp_path)


def test_pickles_of_a_training_run_do_not_matter(folder, tmp_path):
    _copy(folder, tmp_path, "unet", lambda file: None)
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "optimizer.bin").write_bytes(b"boom")
    assert load(tmp_path).fingerprint == load(folder).fingerprint


def test_a_pickle_beside_safetensors_is_never_opened(folder, tmp_path):
    _copy(folder, tmp_path, "unet", lambda file: file.with_suffix(".bin").write_bytes(b"boom"))
    assert load(tmp_path).fingerprint == load(folder).fingerprint


def _truncate(file):
    file.write_bytes(file.read_bytes()[:999])


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
@pytest.mark.parametrize(
    "change", [lambda f: f.unlink(), lambda f: f.write_bytes(b"\0" * 99), _truncate]
)
def test_missing_and_damaged_weights(folder, tmp_path, part, change):
    _copy(folder, tmp_path, part, change)
    with pytest.raises(RetourError, match="weights of .* cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu"}, "without device"),
        ({"dtype": "float16", "offload": True}, "without dtype or offload"),
    ],
)
def test_pipeline_objects_are_not_changed(options, message):
    with pytest.raises(RetourError, match=message):
        load(tiny.sd1(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float17"}, "unknown dtype 'float17': did you mean 'float16'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"device": "toaster"}, "unknown device 'toaster'"),
        ({"device": "cpu", "offload": True}, "offload"),
    ],
)
def test_refused_options(folder, options, message):
    with pytest.raises(RetourError, match=message):
        load(folder, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_absent_gpu(folder):
    with pytest.raises(RetourError, match="'cuda' is not available here"):
        load(folder, device="cuda")


def test_subclasses_of_known_pipelines_are_read():
    class Mine(tiny.StableDiffusionPipeline):
        pass

    pipe = tiny.sd1()
    mine = Mine(**pipe.components, requires_safety_checker=False)
    assert load(mine).fingerprint == load(pipe).fingerprint
