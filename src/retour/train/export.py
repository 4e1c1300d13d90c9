"""Put trained parts together as the folders of half-precision weights that the package ships.

    python -m retour.train.export --clip RUN/clip --vae RUN/vae --unet RUN/unet \\
        --mmdit RUN/transformer [--weights DIR]

Parts that two models share are written once; the others point to them with relative links.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from retour.train import mmdit, unet
from retour.train.loop import replace_folder

CARD = "README.md"
MODEL_FILE = "diffusion_pytorch_model.safetensors"
TEXT_SHARD, OTHER_SHARD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WEIGHTS = Path(__file__).parents[1] / "weights"
SD_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
}
SD3_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusion3Pipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "image_encoder": [None, None],
    "feature_extractor": [None, None],
}


def halved(source: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, floating ones in half precision."""
    return {n: t.half() if t.is_floating_point() else t for n, t in load_file(source).items()}


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as a safetensors file that transformers and diffusers accept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"}
    )
    path.chmod(0o644)


def copy_part(source: Path, target: Path) -> None:
    """Copy the folder of one diffusers model, weights in half precision."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "config.json", target / "config.json")
    write_tensors(halved(source / MODEL_FILE), target / MODEL_FILE)


def write_clip(folder: Path, source: Path) -> None:
    """Write CLIP in two shards: the text encoder, which emoji-mmdit links to, and the rest."""
    tensors = halved(source / "model.safetensors")
    places = {name: TEXT_SHARD if name.startswith("text_") else OTHER_SHARD for name in tensors}
    for shard in (TEXT_SHARD, OTHER_SHARD):
        write_tensors({n: t for n, t in tensors.items() if places[n] == shard}, folder / shard)
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": places},
    )
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
    config = json.loads((source / "config.json").read_text())
    write_json(folder / "config.json", config | {"dtype": "float32"})


# What `retour.load` takes from a folder beyond the pipeline: its defaults, and for the transformer
# how many rows the blank T5 gives it.
FACTS = "retour.json"
UNET_FACTS = {
    "default_guidance": 3.0,
    "default_steps": 50,
    "summary": "text-to-image at 64 px, Stable Diffusion layout, emoji art, v-prediction",
}
MMDIT_FACTS = {
    "default_guidance": 3.0,
    "default_steps": 28,
    "summary": "text-to-image at 64 px, Stable Diffusion 3 layout, emoji art, rectified flow",
    "t5_tokens": 0,
}


def text_config(clip: Path, kind: str) -> dict[str, object]:
    """Configuration of the text encoder alone, as the class `kind`."""
    config = json.loads((clip / "config.json").read_text())
    return config["text_config"] | {"architectures": [kind], "dtype": "float32"}


def write_json(path: Path, value: object) -> None:
    """Write a value as indented JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def link(folder: Path, **targets: str) -> None:
    """Make relative links in a folder."""
    for name, target in targets.items():
        (folder / name).symlink_to(target)


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write the list of a pipeline's parts."""
    write_json(folder / "model_index.json", index | {"_diffusers_version": version("diffusers")})


def write_unet(folder: Path, source: Path, clip: Path) -> None:
    """Fill the folder of emoji-unet."""
    copy_part(source, folder / "unet")
    unet.make_scheduler().save_pretrained(folder / "scheduler")
    tensors = halved(clip / "model.safetensors")
    words = {
        n.removeprefix("text_model."): t for n, t in tensors.items() if n.startswith("text_model.")
    }
    write_tensors(words, folder / "text_encoder" / "model.safetensors")
    write_json(folder / "text_encoder" / "config.json", text_config(clip, "CLIPTextModel"))
    link(folder, vae="../vae", tokenizer="../clip")
    write_index(folder, SD_INDEX)
    write_json(folder / FACTS, UNET_FACTS)


def write_mmdit(folder: Path, source: Path, clip: Path) -> None:
    """Fill the folder of emoji-mmdit."""
    copy_part(source, folder / "transformer")
    mmdit.make_scheduler().save_pretrained(folder / "scheduler")
    write_json(
        folder / "text_encoder" / "config.json", text_config(clip, "CLIPTextModelWithProjection")
    )
    (folder / "text_encoder" / "model.safetensors").symlink_to(f"../../clip/{TEXT_SHARD}")
    width = json.loads((source / "config.json").read_text())["joint_attention_dim"]
    write_blank_t5(folder / "text_encoder_3", folder / "tokenizer_3", width)
    link(
        folder,
        vae="../vae",
        text_encoder_2="text_encoder",
        tokenizer="../clip",
        tokenizer_2="../clip",
    )
    write_index(folder, SD3_INDEX)
    write_json(folder / FACTS, MMDIT_FACTS)


def write_blank_t5(encoder: Path, tokenizer: Path, width: int) -> None:
    """A T5 of two tokens and no layers whose every output row (width,) is zero.

    StableDiffusion3Pipeline uses rows of zeros for want of a T5, but loads without arguments only
    when it finds one.
    """
    config = T5Config(
        vocab_size=2, d_model=width, d_kv=1, d_ff=1, num_layers=0, num_heads=1, pad_token_id=0
    )
    model = T5EncoderModel(config)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.save_pretrained(encoder)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(tokenizer)


def export(weights: Path, clip: Path, vae: Path, denoisers: dict[str, Path]) -> None:
    """Write all folders, keeping their cards (README.md); `denoisers` has "unet" and "mmdit"."""
    writers: dict[str, Callable[[Path], None]] = {
        "clip": lambda folder: write_clip(folder, clip),
        "vae": lambda folder: copy_part(vae, folder),
        "emoji-unet": lambda folder: write_unet(folder, denoisers["unet"], clip),
        "emoji-mmdit": lambda folder: write_mmdit(folder, denoisers["mmdit"], clip),
    }
    for name, write in writers.items():
        replace_folder(weights / name, partial(fill, write=write, old=weights / name))


def fill(folder: Path, write: Callable[[Path], None], old: Path) -> None:
    """Fill a new folder and take over the model card of the old one."""
    write(folder)
    if (old / CARD).exists():
        shutil.copyfile(old / CARD, folder / CARD)


def main() -> None:
    """Export from the command line."""
    parser = argparse.ArgumentParser(prog="python -m retour.train.export", description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    for name in ("clip", "vae", "unet", "mmdit"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    options = parser.parse_args()
    export(
        options.weights, options.clip, options.vae, {"unet": options.unet, "mmdit": options.mmdit}
    )


if __name__ == "__main__":
    main()
