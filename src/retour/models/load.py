"""Loading a model: embedded, from a folder or the hub, or around a pipeline that is there.

Importing this module, and listing the embedded models, loads neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RetourError, unknown

if TYPE_CHECKING:
    import torch

    from ..core.model import Model
    from .base import Family

WEIGHTS = Path(__file__).parent.parent / "weights"
INDEX = "model_index.json"
FACTS = "retour.json"
CHECKER = "safety_checker"
SAFE = ".safetensors"
HUB_SECONDS = 10.0
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


def embedded() -> dict[str, dict[str, Any]]:
    """Facts of each embedded model by name: `summary`, `pipeline`, `bytes`, its own defaults."""
    if not WEIGHTS.is_dir():
        return {}
    folders = sorted(index.parent for index in WEIGHTS.glob(f"*/{INDEX}"))
    return {folder.name: _describe(folder) for folder in folders}


def load(
    model: Any,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    offload: bool = False,
    compile: bool = False,
) -> Model:
    """Make a model ready for use.

    Args:
        model: name of an embedded model, folder of a diffusers pipeline, hub id ("owner/name"), or
            a diffusers pipeline object, which is left exactly as it is.
        device: where to run; by default the GPU if there is one.
        dtype: type of the weights; by default float32 on a CPU, the family's half precision
            elsewhere.
        offload: keep weights in main memory and move each network to the GPU for its turn only.
        compile: run the denoising network through `torch.compile`.

    Raises:
        RetourError: there is no such model, its weights are pickles, no adapter reads it, or the
            options ask to change a pipeline object.
    """
    if not isinstance(model, (str, os.PathLike)):
        return _around(model, device=device, dtype=dtype, offload=offload, compile=compile)
    source, name = _locate(os.fspath(model))
    facts = _facts(Path(source)) if os.path.isdir(source) else {}
    place = _device(device, offload)
    index = _index(source)
    family = _family(index["_class_name"], name)
    pipe = _read(source, name, index, _dtype(dtype, place, facts, family))
    _settle(pipe, place, offload)
    return _adapt(family, pipe, name=name, facts=facts, compile=compile)


def _adapt(family: Family, pipe: Any, **options: Any) -> Model:
    model: Model = family.adapter(pipe, **options)
    return model


def _around(pipe: Any, *, compile: bool, **asked: Any) -> Model:
    if not hasattr(pipe, "components") or not hasattr(pipe, "scheduler"):
        raise RetourError(
            f"a model is a name, a folder or a diffusers pipeline, not {type(pipe).__name__}"
        )
    changes = [name for name, value in asked.items() if value not in (None, False)]
    if changes:
        raise RetourError(
            f"a pipeline object is used as it is, without {' or '.join(changes)}: "
            "move or cast it before, for example with pipe.to(...)"
        )
    names = [cls.__name__ for cls in type(pipe).__mro__]
    known = {name for family in _families() for name in family.pipelines}
    matching = next((name for name in names if name in known), names[0])
    return _adapt(_family(matching, names[0]), pipe, compile=compile)


# Finding


def _locate(model: str) -> tuple[str, str]:
    """Return (folder or hub id, name)."""
    if model in embedded():
        return str(WEIGHTS / model), model
    path = Path(model).expanduser()
    if path.is_dir():
        _check_folder(path)
        return str(path), path.resolve().name
    if path.is_file() or path.suffix in (SAFE, *PICKLES):
        raise RetourError(
            f"{model!r} is a single file: give the folder of a diffusers pipeline, with a {INDEX}"
        )
    if "/" not in model and os.sep not in model:
        raise unknown("model", model, embedded())
    if _is_hub_id(model):
        return model, model
    raise RetourError(
        f"there is no folder {model!r}: give an existing one or a hub id 'owner/name'"
    )


def _is_hub_id(model: str) -> bool:
    parts = model.split("/")
    return len(parts) == 2 and all(parts) and parts[0] not in (".", "..", "~")


def _check_folder(folder: Path) -> None:
    if not (folder / INDEX).is_file():
        raise RetourError(
            f"{str(folder)!r} has no {INDEX}: give the folder of a diffusers pipeline"
        )
    # Only the parts that will be read: a training run leaves pickles of its own beside them.
    parts = [folder / name for name in _json(folder / INDEX) if name != CHECKER]
    for part in (p for p in parts if p.is_dir()):
        suffixes = {file.suffix for file in part.iterdir()}
        pickles = sorted(suffixes.intersection(PICKLES))
        if pickles and SAFE not in suffixes:
            raise RetourError(
                f"{str(part)!r} offers its weights only as {pickles[0]} files, which can run code "
                "when read: convert them to safetensors"
            )


def _index(source: str) -> dict[str, Any]:
    """The pipeline's index, downloaded if `source` is a hub id."""
    path = Path(source) / INDEX
    if not path.is_file():
        path = _download_index(source)
    index = _json(path)
    if not isinstance(index.get("_class_name"), str):
        raise RetourError(f"the {INDEX} of {source!r} does not name a pipeline class of diffusers")
    return index


def _download_index(hub_id: str) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(hub_id, INDEX)
    if isinstance(cached, str):
        return Path(cached)
    try:
        # Asks once, where a download tries again for half a minute.
        HfApi().model_info(hub_id, timeout=HUB_SECONDS)
        return Path(hf_hub_download(hub_id, INDEX))
    except Exception as error:  # connection and hub errors have no common base across versions
        raise _unreachable(hub_id, error) from None


def _unreachable(hub_id: str, error: Exception) -> RetourError:
    names = ", ".join(embedded()) or "none"
    return RetourError(
        f"cannot get {hub_id!r} from the hub ({type(error).__name__}): check its spelling and the "
        f"connection, or use a local folder or an embedded model ({names})"
    )


# Reading


def _read(source: str, name: str, index: dict[str, Any], dtype: torch.dtype) -> Any:
    from .quiet import quietly

    options: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": True}
    if CHECKER in index:
        # Only a pipeline's own call would use it, and that is never made.
        options |= {CHECKER: None, "requires_safety_checker": False}
    if os.path.isdir(source):
        options |= {"local_files_only": True, "variant": _variant(Path(source))}
    try:
        with quietly():
            import diffusers
            from safetensors import SafetensorError

            return getattr(diffusers, index["_class_name"]).from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise RetourError(f"the weights of {name!r} cannot be read ({reason})") from None


def _variant(folder: Path) -> str | None:
    """The variant (such as fp16) that *all* weights of a folder come in, if none is plain."""
    stems = [file.name.removesuffix(SAFE) for file in folder.glob(f"*/*{SAFE}")]
    variants = {stem.split("-")[0].partition(".")[2] for stem in stems}
    return variants.pop() or None if len(variants) == 1 else None


def _settle(pipe: Any, place: torch.device, offload: bool) -> None:
    import torch

    from .quiet import quietly

    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    if pipe.vae.dtype == torch.float16 and getattr(pipe.vae.config, "force_upcast", False):
        pipe.vae.to(torch.float32)
    with quietly():
        if offload:
            pipe.enable_model_cpu_offload(device=place)
        else:
            pipe.to(place)


def _device(device: str | torch.device | None, offload: bool) -> torch.device:
    import torch

    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(accelerator if device is None else device)
    except RuntimeError:
        raise RetourError(f"unknown device {device!r}: choose 'cpu', or 'cuda' for a GPU") from None
    try:
        # What is known by name need not be there: a GPU too few, another system, no memory at all.
        torch.empty(1, device=place).fill_(1).item()
    except (RuntimeError, AssertionError, ImportError):
        found = "choose 'cpu'" + (" or 'cuda'" if accelerator == "cuda" else "")
        raise RetourError(f"device {str(place)!r} is not available here: {found}") from None
    if offload and place.type == "cpu":
        raise RetourError(
            "offload moves networks to a GPU and back, but this runs on the CPU: leave it out"
        )
    return place


def _dtype(
    dtype: str | torch.dtype | None, place: torch.device, facts: dict[str, Any], family: Family
) -> torch.dtype:
    import torch

    wanted = dtype
    if wanted is None:
        wanted = "float32" if place.type == "cpu" else facts.get("dtype", family.half)
    found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise unknown("dtype", wanted, ("float32", "float16", "bfloat16"))
    return found


# Families and facts


def _families() -> Iterator[Family]:
    """The adapters: each module `diffusers_*` of this package declares a `FAMILY`."""
    package = importlib.import_module(__package__)
    for info in pkgutil.iter_modules(package.__path__):
        if info.name.startswith("diffusers_"):
            yield importlib.import_module(f"{__package__}.{info.name}").FAMILY


def _family(pipeline: str, name: str) -> Family:
    families = list(_families())
    for family in families:
        if pipeline in family.pipelines:
            return family
    raise unknown(
        f"kind of pipeline in {name!r}:", pipeline, [p for f in families for p in f.pipelines]
    )


def _describe(folder: Path) -> dict[str, Any]:
    files = {file.resolve() for file in folder.glob(f"*/*{SAFE}")}
    size = sum(file.stat().st_size for file in files)
    index = _json(folder / INDEX)
    return {
        "pipeline": index.get("_class_name", ""),
        "bytes": size,
        "summary": "",
        **_facts(folder),
    }


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS
    return _json(path) if path.is_file() else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RetourError(f"{str(path)!r} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise RetourError(f"{str(path)!r} does not hold a JSON object")
    return content
