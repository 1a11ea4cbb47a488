"""Diffusers folders of every backbone with a few thousand random weights each: the true layout and classes, made in the test."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Handing work to other threads takes longer than work of this size.
torch.set_num_threads(1)

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
SENTENCES = ["a red cat on a mat", "a blue dog in the fog", "cats and dogs", "it's a naive photo of the moon", "portrait of a knight"]
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
SCHEDULERS = {
    "pixart": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "clip_sample": False},
    "sd": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False, "steps_offset": 1},
}


def pixart(
    folder: Path,
    sample_size: int = 8,
    scaling: float = 0.18215,
    tiny_vae: bool = False,
    prediction: str = "epsilon",
    factor: int = 8,
    **config: Any,
) -> Path:
    """PixArt alpha; with `sample_size` 128 as its 1024 models, conditioned on resolution and aspect ratio. `factor`: of a tiny vae."""
    network = pixart_network(sample_size, **config)
    network.save_pretrained(folder / "transformer")
    if tiny_vae:
        tiny_autoencoder(folder / "vae", factor)
    else:
        _vae(folder / "vae", scaling, False)
    t5(folder / "text_encoder", 24)
    t5_tokenizer(folder / "tokenizer")
    _scheduler(folder, "pixart", prediction)
    _index(folder, "PixArtAlphaPipeline", transformer="PixArtTransformer2DModel", text_encoder="T5EncoderModel", tokenizer="T5Tokenizer")
    return folder


def pixart_network(sample_size: int = 8, **config: Any) -> Any:
    """A PixArtTransformer2DModel for 4 latent channels that also learns the variance, in evaluation mode."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    defaults = {
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "caption_channels": 24,
        "use_additional_conditions": sample_size == 128,
    }
    network = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        cross_attention_dim=48,
        sample_size=sample_size,
        patch_size=2,
        **{**defaults, **config},
    )
    # As diffusers starts them, the modulations and the last layer are nearly nothing, and so would be what is wrong with them.
    for name, parameter in network.named_parameters():
        if "scale_shift_table" in name or "adaln_single.linear" in name or name.startswith("proj_out"):
            nn.init.normal_(parameter, std=0.3)
    return network.eval().requires_grad_(False)


def stable_diffusion(
    folder: Path,
    kind: str = "sd21",
    tiny_vae: bool = False,
    scheduler: str = "DDPMScheduler",
    levels: int = 2,
    prediction: str = "epsilon",
    **config: Any,
) -> Path:
    """`kind` sd15, sd21 or sdxl."""
    unet(kind, levels, **config).save_pretrained(folder / "unet")
    two = kind == "sdxl"
    _vae(folder / "vae", 0.13025 if two else 0.18215, tiny_vae)
    _clip(folder / "text_encoder", projected=False)
    clip_tokenizer(folder / "tokenizer", "!" if kind == "sd21" else EOS)
    parts = {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
    if two:
        _clip(folder / "text_encoder_2", projected=True, hidden_size=48, hidden_act="gelu")
        clip_tokenizer(folder / "tokenizer_2", "!")
        parts |= {"text_encoder_2": "CLIPTextModelWithProjection", "tokenizer_2": "CLIPTokenizer"}
    _scheduler(folder, "sd", prediction, scheduler)
    _index(folder, "StableDiffusionXLPipeline" if two else "StableDiffusionPipeline", **parts)
    return folder


def sana_sprint(folder: Path) -> Path:
    """SANA-Sprint with a decoder of factor 32 and a Gemma of two layers."""
    from diffusers import AutoencoderDC, SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    tokenizer = GemmaTokenizer.from_pretrained(gemma_tokenizer(folder / "tokenizer"))
    torch.manual_seed(0)
    text = {"vocab_size": len(tokenizer), "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12, "query_pre_attn_scalar": 12}
    gemma = Gemma2Model(Gemma2Config(**text, **heads))
    for name, weight in gemma.named_parameters():
        # As transformers draws them, norms do nothing and every prompt has nearly the same states.
        nn.init.normal_(weight, std=0.3 if "norm" in name else 0.2)
    network = SanaTransformer2DModel(
        in_channels=8, out_channels=8, num_attention_heads=3, attention_head_dim=8, num_layers=2, num_cross_attention_heads=2,
        cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=24, mlp_ratio=2.0, sample_size=2, patch_size=1,
        qk_norm="rms_norm_across_heads", guidance_embeds=True,
    )  # fmt: skip
    for name, weight in network.named_parameters():
        if "norm_" in name or "scale_shift" in name:
            nn.init.normal_(weight, 1.0, 0.3)
    kinds = ("ResBlock",) * 4 + ("EfficientViTBlock",) * 2
    blocks = {"block_out_channels": (8,) * 6, "layers_per_block": (1,) * 6, "qkv_multiscales": ((),) * 5 + ((5,),), "block_types": kinds}
    decoder = AutoencoderDC(
        latent_channels=8,
        attention_head_dim=4,
        scaling_factor=0.41407,
        **{f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in blocks.items()},
    )
    pipe = SanaSprintPipeline(
        tokenizer=tokenizer,
        text_encoder=gemma.eval(),
        vae=decoder.eval(),
        transformer=network.eval(),
        scheduler=SCMScheduler(prediction_type="trigflow", sigma_data=0.5),
    )
    pipe.save_pretrained(folder)
    return folder


def gemma_tokenizer(folder: Path) -> Path:
    """A BPE over whole texts with Gemma's special tokens and its single bytes for what it does not know, trained on a few words."""
    from tokenizers import Tokenizer, models, normalizers, trainers
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "\N{LOWER ONE EIGHTH BLOCK}")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    backend.train_from_iterator([f" {word}" for sentence in SENTENCES for word in sentence.split()], trainer)
    model = json.loads(backend.to_str())["model"]
    GemmaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], add_bos_token=True).save_pretrained(folder)
    return folder


def unet(kind: str, levels: int = 2, **config: Any) -> Any:
    """A UNet2DConditionModel of `kind` sd15, sd21 or sdxl, in evaluation mode; with one level, all of it has cross-attention."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    # Where the others have cross-attention, SDXL has it not, and the other way round.
    order = (1, 0) if kind == "sdxl" else (0, 1)
    down = [("CrossAttnDownBlock2D", "DownBlock2D")[each] for each in order]
    up = [("UpBlock2D", "CrossAttnUpBlock2D")[each] for each in order]
    if levels == 1:
        down, up = ["CrossAttnDownBlock2D"], ["CrossAttnUpBlock2D"]
    kinds: dict[str, dict[str, Any]] = {
        "sd15": {"attention_head_dim": 4, "cross_attention_dim": 32},
        "sd21": {"attention_head_dim": (2, 4)[:levels], "cross_attention_dim": 32, "use_linear_projection": True},
        "sdxl": {
            "attention_head_dim": (2, 4)[:levels],
            "cross_attention_dim": 32 + 48,
            "transformer_layers_per_block": (1, 2)[:levels],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24 + 6 * 8,
        },
    }
    defaults = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 4}
    network = UNet2DConditionModel(
        **{**defaults, "block_out_channels": (16, 32)[:levels], "down_block_types": down, "up_block_types": up, **kinds[kind], **config}
    )
    return network.eval().requires_grad_(False)


def clip_tokenizer(folder: Path, pad: str) -> Path:
    """A byte-level BPE with a few merges; as in OpenAI's, "!" is id 0 and the special tokens come last."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = ["c a", "ca t</w>", "d o", "do g</w>", "t h", "th e</w>"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges), BOS, EOS]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad, "unk_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def t5_tokenizer(folder: Path) -> Path:
    """A unigram model trained on a few words, as transformers saves it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import T5Tokenizer

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    pieces = json.loads(backend.to_str())["model"]["vocab"]
    T5Tokenizer(vocab=[tuple(piece) for piece in pieces], extra_ids=0).save_pretrained(folder)
    return folder


def t5(folder: Path, width: int) -> Path:
    """A T5 v1.1 encoder of two layers."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=48, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu")
    T5EncoderModel(config).save_pretrained(folder)
    return folder


def tiny_autoencoder(folder: Path, factor: int = 8) -> Path:
    """A decoder in the layout of TAESD, with a stage for each power of two in `factor`."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    stages = factor.bit_length()
    widths, blocks = (8,) * stages, (1,) * stages
    vae = AutoencoderTiny(
        encoder_block_out_channels=widths, decoder_block_out_channels=widths, num_encoder_blocks=blocks, num_decoder_blocks=blocks
    )
    # Else its pictures are black for the most part.
    nn.init.normal_(vae.decoder.layers[-1].weight, std=0.3)
    nn.init.constant_(vae.decoder.layers[-1].bias, 0.5)
    vae.save_pretrained(folder)
    return folder


def _vae(folder: Path, scaling: float, tiny: bool) -> None:
    from diffusers import AutoencoderKL

    if tiny:
        tiny_autoencoder(folder)
    else:
        torch.manual_seed(0)
        AutoencoderKL(**VAE, scaling_factor=scaling).save_pretrained(folder)


def _clip(folder: Path, projected: bool, hidden_size: int = 32, hidden_act: str = "quick_gelu") -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=520,
        hidden_size=hidden_size,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        projection_dim=24,
        hidden_act=hidden_act,
        bos_token_id=518,
        eos_token_id=519,
        pad_token_id=519,
    )
    (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).save_pretrained(folder)


def clip(folder: Path) -> Path:
    """A CLIPModel with its tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = {"vocab_size": 520, "hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 2}
    text |= {"bos_token_id": 518, "eos_token_id": 519, "pad_token_id": 519}
    vision = {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    }
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    return clip_tokenizer(folder, EOS)


def _scheduler(folder: Path, family: str, prediction: str = "epsilon", kind: str = "DDPMScheduler") -> None:
    import diffusers

    config = {**SCHEDULERS[family], "prediction_type": prediction}
    if kind != "DDPMScheduler":
        config = {**config, "timestep_spacing": "trailing"}
        del config["clip_sample"]
    getattr(diffusers, kind)(**config).save_pretrained(folder / "scheduler")


def _index(folder: Path, pipeline: str, **parts: str) -> None:
    """model_index.json, by which diffusers' pipelines are opened."""
    vae, scheduler = (
        json.loads((folder / name).read_text())["_class_name"] for name in ("vae/config.json", "scheduler/scheduler_config.json")
    )
    libraries = {name: ["transformers" if name.startswith(("text", "tokenizer")) else "diffusers", kind] for name, kind in parts.items()}
    absent = {} if "transformer" in parts else {part: [None, None] for part in ("safety_checker", "feature_extractor", "image_encoder")}
    if "text_encoder_2" in parts:
        del absent["safety_checker"]
    document = {"_class_name": pipeline, "vae": ["diffusers", vae], "scheduler": ["diffusers", scheduler], **libraries, **absent}
    (folder / "model_index.json").write_text(json.dumps(document))
