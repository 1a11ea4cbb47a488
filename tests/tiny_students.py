"""Diffusers folders of every backbone with a few thousand random weights each: the true layout and classes, made in the test."""

import json
from pathlib import Path

import torch
from torch import nn

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
    "pixart": {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "prediction_type": "epsilon"},
    "sd": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon"},
}


def pixart(folder: Path, sample_size: int = 8, conditions: bool = False, scaling: float = 0.18215) -> Path:
    """PixArt alpha at 64 x 64 pixels; `conditions`: as its 1024 models, with resolution and aspect ratio."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    network = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=sample_size,
        patch_size=2,
        caption_channels=24,
        use_additional_conditions=conditions,
    )
    nn.init.normal_(network.proj_out.weight, std=0.1)
    network.save_pretrained(folder / "transformer")
    _vae(folder / "vae", scaling)
    t5(folder / "text_encoder", 24)
    t5_tokenizer(folder / "tokenizer")
    _scheduler(folder, "pixart")
    return folder


def stable_diffusion(folder: Path, two: bool = False, linear: bool = True) -> Path:
    """SD 1.5 (`linear` False), SD 2.1, or SDXL (`two` text encoders) at 64 x 64 pixels."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 4}
    if two:
        network = UNet2DConditionModel(
            **sizes,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            cross_attention_dim=32 + 48,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
        )
    else:
        network = UNet2DConditionModel(
            **sizes,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=4 if not linear else (2, 4),
            use_linear_projection=linear,
            cross_attention_dim=32,
        )
    network.save_pretrained(folder / "unet")
    _vae(folder / "vae", 0.13025 if two else 0.18215)
    _clip(folder / "text_encoder", projected=False)
    clip_tokenizer(folder / "tokenizer", EOS if two or not linear else "!")
    if two:
        _clip(folder / "text_encoder_2", projected=True, hidden_size=48, hidden_act="gelu")
        clip_tokenizer(folder / "tokenizer_2", "!")
    _scheduler(folder, "sd")
    return folder


def clip_tokenizer(folder: Path, pad: str) -> Path:
    """A byte-level BPE with a few merges; as in OpenAI's, "!" is id 0 and the special tokens come last."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    merges = ["c a", "ca t</w>", "d o", "do g</w>", "t h", "th e</w>"]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges), BOS, EOS]
    folder.mkdir(parents=True)
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


def tiny_autoencoder(folder: Path) -> Path:
    """A decoder in the layout of TAESD."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4
    ).save_pretrained(folder)
    return folder


def _vae(folder: Path, scaling: float) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL(**VAE, scaling_factor=scaling).save_pretrained(folder)


def _clip(folder: Path, projected: bool, hidden_size: int = 32, hidden_act: str = "quick_gelu") -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=520,
        hidden_size=hidden_size,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        projection_dim=24,
        hidden_act=hidden_act,
        eos_token_id=519,
    )
    (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).save_pretrained(folder)


def _scheduler(folder: Path, kind: str) -> None:
    from diffusers import DDPMScheduler

    DDPMScheduler(**SCHEDULERS[kind]).save_pretrained(folder / "scheduler")
