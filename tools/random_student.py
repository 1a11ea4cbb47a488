"""Writes a diffusers folder of a backbone at its full size with random weights: what speed, memory and parity are measured on.

The classes and sizes are those of the public checkpoints, the weights are drawn by each class's own initialisation from one seed. Pictures
of such a student are noise. With --tiny the folder has a few thousand weights, to try the road.
python tools/random_student.py pixart --out runs/pixart
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import tiny_students

from snoopi_rt.export.weights.files import save_tensors

SD_UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
UNETS = {
    "sd15": {**SD_UNET, "attention_head_dim": 8, "cross_attention_dim": 768},
    "sd21": {**SD_UNET, "attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True},
    "sdxl": {
        **SD_UNET,
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
CLIPS = {
    "sd15": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12, "hidden_act": "quick_gelu"},
    "sd21": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23, "hidden_act": "gelu"},
    "bigg": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "hidden_act": "gelu",
        "projection_dim": 1280,
    },
}
VAE = {
    "latent_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 512,
}
SANA = {"sample_size": 32, "qk_norm": "rms_norm_across_heads", "guidance_embeds": True, "mlp_ratio": 2.5, "caption_channels": 2304}
SANAS = {
    "0.6": {
        **SANA,
        "num_layers": 28,
        "num_attention_heads": 36,
        "num_cross_attention_heads": 16,
        "cross_attention_head_dim": 72,
        "cross_attention_dim": 1152,
    },
    "1.6": {**SANA, "num_layers": 20},
}
DC_AE = {
    "decoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "encoder_block_types": ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "scaling_factor": 0.41407,
}
T5_XXL = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
SHARD = 2 * 2**30


@click.command()
@click.argument("backbone", type=click.Choice(["pixart", "sana", *UNETS]))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--seed", default=0)
@click.option("--tiny", is_flag=True, help="A few thousand weights.")
@click.option("--text-layers", type=int, help="Of T5 or Gemma: fewer make a smaller text encoder of the same width.")
@click.option("--billions", type=click.Choice(sorted(SANAS)), default="0.6", help="SANA's parameters.")
def main(backbone: str, out: Path, seed: int, tiny: bool, text_layers: int | None, billions: str) -> None:
    """Write a student of BACKBONE with random weights to the folder --out, in diffusers layout."""
    write(backbone, out, seed, tiny, text_layers, billions)
    decoder = f", its tiny decoder in {out / 'taesd'}" if (out / "taesd").exists() else ""
    click.echo(f"{out}: a{' tiny' if tiny else ''} {backbone} student with random weights{decoder}")


def write(backbone: str, out: Path, seed: int, tiny: bool, text_layers: int | None, billions: str) -> None:
    """Writes the folder."""
    from diffusers import AutoencoderKL, PixArtTransformer2DModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if tiny and backbone == "sana":
        tiny_students.sana_sprint(out)
        return
    if tiny:
        tiny_students.tiny_autoencoder(out / "taesd")
        if backbone == "pixart":
            tiny_students.pixart(out, num_layers=1)
        else:
            tiny_students.stable_diffusion(out, backbone, levels=1, mid_block_type=None, scheduler="EulerDiscreteScheduler")
        return
    torch.manual_seed(seed)
    if backbone == "sana":
        sana(out, billions, text_layers, seed)
        return
    scaling = 0.13025 if backbone == "sdxl" else 0.18215
    AutoencoderKL(**VAE, scaling_factor=scaling).save_pretrained(out / "vae")
    tiny_autoencoder(out / "taesd")
    if backbone == "pixart":
        network: nn.Module = PixArtTransformer2DModel(sample_size=64, caption_channels=4096, use_additional_conditions=False)
        nn.init.normal_(network.proj_out.weight, std=0.02)
        network.save_pretrained(out / "transformer")
        t5(out / "text_encoder", {**T5_XXL, "num_layers": text_layers or 24}, seed)
        tiny_students.t5_tokenizer(out / "tokenizer")
        tiny_students._scheduler(out, "pixart")
        return
    UNet2DConditionModel(**UNETS[backbone]).save_pretrained(out / "unet")
    shared = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    first = CLIPTextConfig(**CLIPS["sd21" if backbone == "sd21" else "sd15"], **shared)
    CLIPTextModel(first).save_pretrained(out / "text_encoder")
    tiny_students.clip_tokenizer(out / "tokenizer", "!" if backbone == "sd21" else tiny_students.EOS)
    if backbone == "sdxl":
        CLIPTextModelWithProjection(CLIPTextConfig(**CLIPS["bigg"], **shared)).save_pretrained(out / "text_encoder_2")
        tiny_students.clip_tokenizer(out / "tokenizer_2", "!")
    tiny_students._scheduler(out, "sd", kind="EulerDiscreteScheduler")


def tiny_autoencoder(folder: Path) -> None:
    """TAESD's own sizes."""
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny()
    with torch.no_grad():
        # As it is drawn, all its pictures would be nearly black.
        picture, last = vae.decoder(torch.randn(2, 4, 64, 64)), vae.decoder.layers[-1]
        gain = 0.5 / picture.std()
        last.weight *= gain
        last.bias *= gain
        last.bias += 0.5 - gain * (picture.mean() + 1) / 2
    vae.save_pretrained(folder)


def sana(out: Path, billions: str, layers: int | None, seed: int) -> None:
    """SANA-Sprint with the whole of Gemma-2-2b, whose tokenizer is the tests' small one."""
    from diffusers import AutoencoderDC, SanaTransformer2DModel, SCMScheduler
    from transformers import Gemma2Config, Gemma2Model

    network = SanaTransformer2DModel(**SANAS[billions])
    nn.init.normal_(network.proj_out.weight, std=0.02)
    for block in network.transformer_blocks:
        nn.init.normal_(block.scale_shift_table, std=0.3)  # as it is drawn, gates are nearly nothing and hide a block's errors
    network.save_pretrained(out / "transformer")
    AutoencoderDC(**DC_AE).save_pretrained(out / "vae")
    SCMScheduler().save_pretrained(out / "scheduler")
    tiny_students.gemma_tokenizer(out / "tokenizer")
    config = Gemma2Config(num_hidden_layers=layers or 26)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Gemma2Model(config).state_dict().items()}
    random = torch.Generator().manual_seed(seed)

    def tensor(name: str) -> torch.Tensor:
        fan = 1 if name == "embed_tokens.weight" else shapes[name][-1]
        drawn = torch.zeros(shapes[name]) if "norm" in name else torch.randn(shapes[name], generator=random)
        return (drawn * (0.02 if fan == 1 else fan**-0.5)).to(torch.bfloat16)

    shards(out / "text_encoder", shapes, tensor)
    config.save_pretrained(out / "text_encoder")


def t5(folder: Path, sizes: dict[str, int], seed: int) -> None:
    """A T5 v1.1 encoder in bf16, one shard in memory at a time."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(**sizes, feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in T5EncoderModel(config).state_dict().items() if "embed_tokens" not in name}
    random = torch.Generator().manual_seed(seed)
    shards(folder, shapes, lambda name: t5_tensor(name, shapes[name], sizes["d_kv"], random))
    config.save_pretrained(folder)


def shards(folder: Path, shapes: dict[str, torch.Size], tensor: Callable[[str], torch.Tensor]) -> None:
    """Writes the tensors of a text encoder, one shard in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[list[str]] = [[]]
    for name in shapes:
        if sum(2 * shapes[other].numel() for other in parts[-1]) > SHARD:
            parts.append([])
        parts[-1].append(name)
    index: dict[str, str] = {}
    for number, names in enumerate(tqdm(parts, desc="text encoder", unit="shard"), 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_tensors(folder / file, {name: tensor(name) for name in names}, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8")


def t5_tensor(name: str, shape: torch.Size, d_kv: int, random: torch.Generator) -> torch.Tensor:
    """As T5's own initialisation: products keep the size of their input, and q takes the softmax's missing 1 / sqrt(d) too."""
    if "layer_norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    fan = shape[-1] * (d_kv if name.endswith(".q.weight") else 1)
    return (torch.randn(shape, generator=random) * (1.0 if name == "shared.weight" else fan**-0.5)).to(torch.bfloat16)


if __name__ == "__main__":
    main()
