"""Train the tiny CLIP: vocabulary, text encoder (conditioner of the generators), vision encoder.

    python -m retour.train.clip --data SPRITES --out RUN --minutes 20

A batch holds edit pairs (one attribute changed: object, colour, background, style, place), so that
every image meets a hard negative; the loss is the symmetric contrastive one, blind to other rows
with the same caption.

    python -m retour.train.clip --data SPRITES --out RUN2 --start RUN/clip --vision-only

trains the image side further against the words as they are: the generators' conditions stay.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from retour.data.palette import BACKGROUNDS, OBJECT_COLOURS
from retour.data.scenes import (
    CORNERS,
    RELATIONS,
    SCALES,
    STYLE_PHRASES,
    Form,
    Mix,
    Sampler,
    Studio,
    edited,
    make_split,
    with_article,
)
from retour.data.sprites import SIZE, Sprites, load
from retour.train.loop import Trainer, add_data, options_from, parser
from retour.train.vae import to_tensor

MAX_TOKENS = 32
VOCABULARY = 1300
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
HARD = ("object", "colour", "background", "style", "position")
MIX = Mix(centred=0.5, large=0.1, small=0.1, corner=0.15, two=0.15, recoloured=0.4, jitter=0.05)


def phrases(sprites: Sprites) -> dict[str, list[str]]:
    """Everything that captions are made of, by kind."""
    return {
        "concepts": [with_article(concept) for concept in sprites.concepts],
        "styles": list(STYLE_PHRASES.values()),
        "colours": list(OBJECT_COLOURS),
        "backgrounds": [f"on {with_article(name)} background" for name in BACKGROUNDS],
        "sizes": [name for name in SCALES if name != "regular"],
        "places": list(CORNERS),
        "relations": list(RELATIONS),
    }


def train_tokenizer(texts: Iterable[str], size: int = VOCABULARY) -> CLIPTokenizer:
    """A CLIP tokenizer with merges learned on `texts`; every byte has a token."""
    blank = CLIPTokenizer()
    words = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    words.normalizer = blank.backend_tokenizer.normalizer
    words.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(alphabet),
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    words.train_from_iterator(texts, trainer)
    learned = json.loads(words.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    tokens = [
        *alphabet,
        *(f"{letter}</w>" for letter in alphabet),
        *("".join(pair) for pair in merges),
        BOS,
        EOS,
    ]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocabulary, merges, model_max_length=MAX_TOKENS)


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A randomly initialised CLIP of 1.6 M parameters for a tokenizer."""
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 160,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 5,
        "max_position_embeddings": MAX_TOKENS,
        "projection_dim": 128,
        "hidden_act": "gelu",
        "pad_token_id": tokenizer.pad_token_id,
        **ends,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 8,
        "projection_dim": 128,
        "hidden_act": "gelu",
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token numbers (B, 32), padded and cut."""
    options = {
        "padding": "max_length",
        "max_length": MAX_TOKENS,
        "truncation": True,
        "return_tensors": "pt",
    }
    return tokenizer(texts, **options).input_ids


def trimmed(ids: Tensor, eos: int) -> Tensor:
    """Token rows (B, L) without the columns that hold only padding."""
    longest = int((ids == eos).int().argmax(dim=1).max())
    return ids[:, : longest + 1]


def embed_images(model: CLIPModel, images: Tensor) -> Tensor:
    """Unit vectors (B, 128) of images (B, 3, 64, 64) in -1..1."""
    pooled = model.vision_model(pixel_values=images).pooler_output
    return F.normalize(model.visual_projection(pooled), dim=-1)


def embed_texts(model: CLIPModel, ids: Tensor) -> Tensor:
    """Unit vectors (B, 128) of token rows (B, L)."""
    pooled = model.text_model(
        input_ids=trimmed(ids, model.config.text_config.eos_token_id)
    ).pooler_output
    return F.normalize(model.text_projection(pooled), dim=-1)


def contrastive_loss(
    images: Tensor, texts: Tensor, scale: Tensor, same: Tensor
) -> tuple[Tensor, Tensor]:
    """Symmetric cross-entropy of unit vectors (B, D), and the accuracy.

    `same` (B, B) marks equal captions off the diagonal, which count for nothing.
    """
    logits = (scale * images @ texts.T).masked_fill(same, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    loss = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
    return loss, (logits.argmax(dim=1) == target).float().mean()


class ClipTask:
    """Tell scenes from their edits by their captions."""

    part = "clip"

    def __init__(
        self,
        train: Sampler,
        tokenizer: CLIPTokenizer,
        batch: int,
        device: str,
        model: CLIPModel,
        vision_only: bool = False,
    ) -> None:
        if vision_only:
            for part in (model.text_model, model.text_projection):
                part.requires_grad_(False)
        self.train, self.tokenizer, self.batch, self.device, self.model = (
            train,
            tokenizer,
            batch,
            device,
            model,
        )

    def couple(self, number: int) -> tuple[list, list[str]]:
        """Both images and captions of an edit pair of scene `number`."""
        rng = self.train.rng(number, 4)
        scene, studio = self.train.scene(number), self.train.studio
        kinds = HARD[:4] if len(scene.items) > 1 else HARD
        kind = str(rng.choice(kinds))
        changed = edited(scene, self.train.edit(number, kind))
        if any(self.train.split.held_out(item.concept, changed.style) for item in changed.items):
            changed = edited(scene, self.train.edit(number, "background"))
        form = Form(
            style=kind == "style" or rng.random() < 0.85, natural_colours=rng.random() < 0.4
        )
        scenes = (scene, changed)
        return [studio.render(s) for s in scenes], [studio.caption(s, form) for s in scenes]

    def pairs(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, 64, 64) in -1..1 and token rows (B, 32) of a step."""
        half = self.batch // 2
        couples = [self.couple(n) for n in range(step * half, (step + 1) * half)]
        images = to_tensor([image for images, _ in couples for image in images])
        ids = tokenize(self.tokenizer, [text for _, texts in couples for text in texts])
        return images.to(self.device), ids.to(self.device)

    def loss(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Contrastive loss and in-batch accuracy."""
        images, ids = self.pairs(step)
        same = (ids[:, None] == ids[None]).all(-1).fill_diagonal_(False)
        scale = self.model.logit_scale.clamp(max=4.6).exp()
        vectors = embed_images(self.model, images), embed_texts(self.model, ids)
        loss, accuracy = contrastive_loss(*vectors, scale, same)
        return {"loss": loss, "accuracy": accuracy, "scale": scale}

    def picture(self, model: CLIPModel) -> None:
        """A CLIP has no picture."""

    def publish(self, model: CLIPModel, folder: Path) -> None:
        """Write model, tokenizer and `captions.json` (the phrases that it knows)."""
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (folder / "captions.json").write_text(
            json.dumps(phrases(self.train.studio.sprites), indent=1)
        )


@torch.no_grad()
def retrieval(
    model: CLIPModel, tokenizer: CLIPTokenizer, sampler: Sampler, count: int = 100, rounds: int = 5
) -> float:
    """Share of images whose own caption scores best of `count`, over `rounds` draws of scenes."""
    hits = []
    for start in range(0, count * rounds, count):
        scenes = [sampler.scene(number) for number in range(start, start + count)]
        images = to_tensor([sampler.studio.render(scene) for scene in scenes])
        ids = tokenize(tokenizer, [sampler.studio.caption(scene) for scene in scenes])
        scores = embed_images(model, images) @ embed_texts(model, ids).T
        best = scores.argmax(dim=1)
        hits.append((ids[best] == ids).all(-1).float().mean())
    return float(torch.stack(hits).mean())


def begin(start: Path | None, sprites: Sprites) -> tuple[CLIPTokenizer, CLIPModel]:
    """Tokenizer and model to train: those of the folder `start`, or new ones."""
    if start is not None:
        return CLIPTokenizer.from_pretrained(start), CLIPModel.from_pretrained(start)
    words = phrases(sprites)
    tokenizer = train_tokenizer([text for texts in words.values() for text in texts])
    return tokenizer, make_clip(tokenizer)


def main() -> None:
    """Train from the command line; the averaged model goes to RUN/clip."""
    command = add_data(parser("clip", batch=128, lr=1e-3, ema=0.995, channels_last=False))
    command.add_argument("--start", type=Path, help="model folder to start from")
    command.add_argument("--vision-only", action="store_true", help="keep the text side")
    arguments = command.parse_args()
    if arguments.vision_only and arguments.start is None:
        command.error("--vision-only needs --start, the model whose text side stays")
    options = options_from(arguments)
    studio = Studio(load(arguments.data, arguments.concepts))
    train = Sampler(studio, make_split(studio.sprites), options.seed, "train", MIX)
    tokenizer, model = begin(arguments.start, studio.sprites)
    task = ClipTask(train, tokenizer, options.batch, options.device, model, arguments.vision_only)
    model = Trainer(task, options).fit().cpu()
    check = Sampler(studio, train.split, options.seed + 1)
    print(f"100-way retrieval {retrieval(model, tokenizer, check):.3f}")


if __name__ == "__main__":
    main()
