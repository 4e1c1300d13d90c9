"""Tiny randomly initialised pipelines of every family, of diffusers' own classes, without files.

Each call builds afresh, in eval mode and always with the same weights: mutate freely. Pictures are
16 x 16 (latents 4 x 8 x 8); prompts hold at most 16 tokens, words of `WORDS` being one token each.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    GPT2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = ("a", "red", "green", "apple", "pear", "cat", "on", "blue", "background", "photo", "of")
SIZE = 16
TOKENS = 16
LONG_TOKENS = 24
WIDTH = 16
SEED = 7


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer: `WORDS` and every byte, lower case, `</w>` at the ends of words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(char + "</w>" for char in alphabet)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        _merge(parts, tokens, merges)
    ends = ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate([*dict.fromkeys(tokens), *ends])}
    return CLIPTokenizer(vocab, merges, model_max_length=TOKENS)


def byte_tokenizer() -> GPT2Tokenizer:
    """A byte-level tokenizer: words carry their leading space, strange letters fall into bytes."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        _merge(list(word), tokens, merges)
        if len(word) > 1:
            tokens.append("Ġ" + word)
            merges.append(("Ġ", word))
    vocab = {token: i for i, token in enumerate([*dict.fromkeys(tokens), "<|endoftext|>"])}
    end = "<|endoftext|>"
    return GPT2Tokenizer(vocab, merges, pad_token=end, model_max_length=TOKENS)


def t5_tokenizer() -> T5Tokenizer:
    """T5's sentencepiece tokenizer: `▁` before words, `</s>` last, unknown letters exist."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -1.0) for word in WORDS]
    pieces += [(char, -5.0) for char in "abcdefghijklmnopqrstuvwxyz,."]
    return T5Tokenizer(pieces, extra_ids=0, model_max_length=LONG_TOKENS)


def sd1(**scheduler: Any) -> StableDiffusionPipeline:
    """Like Stable Diffusion 1.x: eps, discrete, last level not clean."""
    return _sd(seed=SEED, heads={"attention_head_dim": 4}, **scheduler)


def sd2(**scheduler: Any) -> StableDiffusionPipeline:
    """Like Stable Diffusion 2.x: v-prediction, linear projections, heads per block."""
    heads = {"attention_head_dim": (2, 4), "use_linear_projection": True}
    options = {"prediction_type": "v_prediction", **scheduler}
    return _sd(seed=SEED + 1, heads=heads, **options)


def sdxl(**config: Any) -> StableDiffusionXLPipeline:
    """Like SDXL: two encoders, pooled text and sizes as conditions, float16-shy VAE, Euler."""
    with torch.random.fork_rng([]):
        torch.manual_seed(SEED + 2)
        unet = _unet(
            cross_attention_dim=2 * WIDTH,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        )
        pipe = StableDiffusionXLPipeline(
            vae=_vae(scaling_factor=0.13, force_upcast=True),
            text_encoder=_clip(CLIPTextModel),
            text_encoder_2=_clip(CLIPTextModelWithProjection),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(),
            unet=unet,
            scheduler=EulerDiscreteScheduler(**_levels(), timestep_spacing="leading"),
            add_watermarker=False,
            **config,
        )
    return _ready(pipe)


def sd3(encoders: tuple[int, ...] = (1, 2, 3), **scheduler: Any) -> StableDiffusion3Pipeline:
    """Like SD3.5: joint attention (the first block dual), flow, shift 3; any of `encoders`."""
    with torch.random.fork_rng([]):
        torch.manual_seed(SEED + 3)
        transformer = SD3Transformer2DModel(
            sample_size=SIZE // 2,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=32,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=12,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
        towers = {
            "text_encoder": _clip(CLIPTextModelWithProjection),
            "text_encoder_2": _clip(CLIPTextModelWithProjection),
            "text_encoder_3": _t5(),
        }
        vae = _vae(
            scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False
        )
    tokenizers = {
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "tokenizer_3": t5_tokenizer(),
    }
    chosen = {1: "", 2: "_2", 3: "_3"}
    parts = {
        kind + suffix: (towers | tokenizers)[kind + suffix] if k in encoders else None
        for k, suffix in chosen.items()
        for kind in ("text_encoder", "tokenizer")
    }
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        **parts,
    )
    return _ready(pipe)


def flux(distilled: bool = True, **scheduler: Any) -> FluxPipeline:
    """Like FLUX.1-dev: one double and one single block, dynamic shift, embedded guidance."""
    with torch.random.fork_rng([]):
        torch.manual_seed(SEED + 4)
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=distilled,
            axes_dims_rope=(2, 2, 4),
        )
        towers = {"text_encoder": _clip(CLIPTextModel), "text_encoder_2": _t5()}
        vae = _vae(
            scaling_factor=0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False
        )
    levels = {
        "use_dynamic_shifting": True,
        "shift": 3.0,
        "base_image_seq_len": 4,
        "max_image_seq_len": 64,
    }
    pipe = FluxPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(**{**levels, **scheduler}),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        **towers,
    )
    pipe.default_sample_size = SIZE // 2
    return _ready(pipe)


def wan(**scheduler: Any) -> WanPipeline:
    """Like Wan 2.1: a clip of 16 x 16 in latents 4 x f x 8 x 8, two frames to a latent frame."""
    with torch.random.fork_rng([]):
        torch.manual_seed(SEED + 5)
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=2 * WIDTH,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        )
        vae = AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.7, 1.0, 2.0],
            scale_factor_temporal=2,
            scale_factor_spatial=2,
        )
        config = UMT5Config(
            vocab_size=len(t5_tokenizer()),
            d_model=2 * WIDTH,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
        )
        encoder = UMT5EncoderModel(config)
    pipe = WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=encoder,
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
    )
    return _ready(pipe)


PIPELINES = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl, "sd3": sd3, "flux": flux}


def _sd(seed: int, heads: dict[str, Any], **scheduler: Any) -> StableDiffusionPipeline:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        pipe = StableDiffusionPipeline(
            vae=_vae(scaling_factor=0.2),
            text_encoder=_clip(CLIPTextModel),
            tokenizer=clip_tokenizer(),
            unet=_unet(cross_attention_dim=WIDTH, **heads),
            scheduler=DDIMScheduler(
                **{**_levels(), "clip_sample": False, "set_alpha_to_one": False, **scheduler}
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _ready(pipe)


def _ready(pipe: Any) -> Any:
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _levels() -> dict[str, Any]:
    return {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "steps_offset": 1,
    }


def _unet(**options: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        **options,
    )


def _vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=SIZE,
        **{"force_upcast": False, **options},
    )


def _clip(cls: type) -> Any:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = cls(config)
    # The default spread of 0.02 would leave the text too faint to matter.
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    return model


def _t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=2 * WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
    )
    return T5EncoderModel(config)


def _merge(parts: list[str], tokens: list[str], merges: list[tuple[str, str]]) -> None:
    whole = parts[0]
    for part in parts[1:]:
        if (whole, part) not in merges:
            merges.append((whole, part))
        whole += part
        tokens.append(whole)
