"""The real peers of tools/compare.py on the same weights: openvino.genai and stable-diffusion.cpp, as PyPI has them.

Both take Stable Diffusion 1.5 and 2.1 in diffusers layout. Neither can take a negative prompt in one step: openvino.genai refuses it, and
stable-diffusion.cpp ignores it at cfg_scale 1.
"""

import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from snoopi_rt.engines.openvino import import_openvino
from snoopi_rt.engines.threads import available_threads
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.export.weights.files import save_tensors

PACKAGES = {"openvino.genai": "openvino-genai", "stable-diffusion.cpp": "stable-diffusion-cpp-python"}
MODULES = {"openvino.genai": "openvino_genai", "stable-diffusion.cpp": "stable_diffusion_cpp"}
BACKBONES = ("sd15", "sd21")
GGML_TYPES = ("f16", "q8_0")


@dataclass(frozen=True)
class Job:
    """What every contender draws, and where its weights are."""

    student: Path
    """A diffusers folder of SD 1.5 or 2.1."""
    vae: Path
    """The decoder of all contenders: the folder's own AutoencoderKL, or TAESD."""
    size: tuple[int, int]
    """(height, width) in pixels."""
    prediction: str
    """epsilon or v."""
    noise: np.ndarray
    """(C, h, w) float32, standard normal."""
    seed: int


@dataclass
class Peer:
    """A loaded peer: a call draws one image, (H, W, 3) uint8, of a prompt."""

    draw: Callable[[str], np.ndarray]
    parts: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of each call's parts, if the peer reports them."""
    same_noise: bool = False
    """Whether it starts from the job's noise, so that its image can be compared with ours."""

    def __call__(self, prompt: str) -> np.ndarray:
        return self.draw(prompt)


def installed() -> list[str]:
    """The names of the peers whose package is installed."""
    return [name for name, module in MODULES.items() if importlib.util.find_spec(module) is not None]


def missing() -> Iterator[str]:
    """A line for each peer whose package is not installed."""
    for name, package in PACKAGES.items():
        if name not in installed():
            yield f"{name} is left out: it needs {package}, of the extra peers"


def loaders(job: Job, folder: Path) -> dict[str, Callable[[], Peer]]:
    """What loads each installed peer, by name; converted weights are written to `folder`."""
    loads: dict[str, Callable[[], Peer]] = {}
    if "openvino.genai" in installed():
        loads["openvino.genai"] = partial(genai, job, folder / "genai")
    if "stable-diffusion.cpp" in installed():
        for ggml_type in GGML_TYPES:
            loads[f"stable-diffusion.cpp {ggml_type}"] = partial(stable_diffusion_cpp, job, folder / "cpp", ggml_type)
    return loads


def genai(job: Job, folder: Path) -> Peer:
    """openvino.genai with its own choices on the CPU, of OpenVINO's own conversion with weights in fp16, which is its default."""
    openvino = import_openvino()
    import openvino_genai

    convert_for_genai(job, folder)
    pipe = openvino_genai.Text2ImagePipeline(folder, "CPU")

    class Noise(openvino_genai.Generator):
        """The job's noise, whatever the seed."""

        def __init__(self) -> None:
            openvino_genai.Generator.__init__(self)

        def randn_tensor(self, shape: Any) -> Any:
            return openvino.Tensor(np.ascontiguousarray(job.noise.reshape(shape)))

        def seed(self, value: int) -> None:
            pass

    peer = Peer(lambda prompt: np.empty(0), {"text_encoder": [], "generator": [], "decoder": []}, same_noise=True)

    def draw(prompt: str) -> np.ndarray:
        height, width = job.size
        image = pipe.generate(prompt, num_inference_steps=1, guidance_scale=1.0, height=height, width=width, generator=Noise()).data[0]
        metrics = pipe.get_performance_metrics()
        peer.parts["text_encoder"].append(sum(metrics.get_text_encoder_infer_duration().values()) / 1e3)
        peer.parts["generator"].append(metrics.get_unet_infer_duration().mean / 1e3)
        peer.parts["decoder"].append(metrics.get_vae_decoder_infer_duration() / 1e3)
        return np.array(image)

    peer.draw = draw
    return peer


def convert_for_genai(job: Job, folder: Path) -> None:
    """Writes the OpenVINO models that `optimum-cli export openvino --weight-format fp16` would, which needs an older transformers."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    states = torch.zeros(1, 77, read(job.student / "unet")["cross_attention_dim"])
    latent = torch.zeros(1, *job.noise.shape)
    ids = torch.zeros(1, 77, dtype=torch.int64)

    class TextEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = load_module(job.student / "text_encoder", CLIPTextModel)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.model(input_ids).last_hidden_state

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = load_module(job.student / "unet", UNet2DConditionModel)

        def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            return self.model(sample, timestep, encoder_hidden_states, return_dict=False)[0]

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            import diffusers

            self.model = load_module(job.vae, getattr(diffusers, read(job.vae)["_class_name"]))

        def forward(self, latent_sample: Tensor) -> Tensor:
            return self.model.decode(latent_sample, return_dict=False)[0]

    text_encoder = {"input_ids": ids}
    unet = {"sample": latent, "timestep": torch.tensor([999]), "encoder_hidden_states": states}
    save_openvino(TextEncoder(), text_encoder, "last_hidden_state", folder / "text_encoder", read(job.student / "text_encoder"))
    save_openvino(UNet(), unet, "out_sample", folder / "unet", read(job.student / "unet"))
    config = read(job.vae)
    if config["_class_name"] == "AutoencoderTiny":  # genai reads the config of an AutoencoderKL
        config = {"_class_name": "AutoencoderKL", "latent_channels": config["latent_channels"], "scaling_factor": config["scaling_factor"]}
        config["block_out_channels"] = read(job.vae)["decoder_block_out_channels"]
    save_openvino(Decoder(), {"latent_sample": latent}, "sample", folder / "vae_decoder", config)
    write_other_parts(job, folder)


def write_other_parts(job: Job, folder: Path) -> None:
    """Writes what openvino.genai reads beside the models: tokenizer, scheduler and the list of parts."""
    openvino = import_openvino()
    from openvino_tokenizers import convert_tokenizer

    from snoopi_rt.export.text.rule import clip_tokenizer

    tokenizer = convert_tokenizer(clip_tokenizer(job.student / "tokenizer"), with_detokenizer=False)
    (folder / "tokenizer").mkdir()
    openvino.save_model(tokenizer, folder / "tokenizer" / "openvino_tokenizer.xml")
    (folder / "scheduler").mkdir()
    scheduler = read(job.student / "scheduler", "scheduler_config.json")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler), encoding="utf-8")
    parts = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **parts}), encoding="utf-8")


@torch.no_grad()
def save_openvino(module: nn.Module, example: dict[str, Tensor], output: str, folder: Path, config: dict[str, Any]) -> None:
    """Writes a module as an OpenVINO model with weights in fp16, and its config beside it."""
    openvino = import_openvino()
    model = openvino.convert_model(module.eval(), example_input=example)
    for port, name in zip(model.inputs, example, strict=True):
        port.get_tensor().set_names({name})
    model.output(0).get_tensor().set_names({output})
    folder.mkdir(parents=True)
    openvino.save_model(model, folder / "openvino_model.xml", compress_to_fp16=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def stable_diffusion_cpp(job: Job, folder: Path, ggml_type: str) -> Peer:
    """stable-diffusion.cpp with weights of that type and all threads; its noise is its own."""
    from stable_diffusion_cpp import StableDiffusion

    if not folder.exists():
        link_for_cpp(job.student, folder)
    tiny = read(job.vae)["_class_name"] == "AutoencoderTiny"
    model = StableDiffusion(
        model_path=str(folder),
        taesd_path=str(job.vae / "diffusion_pytorch_model.safetensors") if tiny else "",
        wtype=ggml_type,
        prediction="eps" if job.prediction == "epsilon" else job.prediction,
        vae_decode_only=True,
        n_threads=available_threads(),
        verbose=False,
    )

    def draw(prompt: str) -> np.ndarray:
        height, width = job.size
        options = {"cfg_scale": 1.0, "sample_steps": 1, "sample_method": "euler", "seed": job.seed}
        return np.asarray(model.generate_image(prompt, width=width, height=height, **options)[0])

    return Peer(draw)


def link_for_cpp(student: Path, folder: Path) -> None:
    """A diffusers folder as stable-diffusion.cpp reads it: the text encoder's tensors have the prefix of older versions of transformers."""
    folder.mkdir(parents=True)
    for part in ("unet", "vae"):
        (folder / part).symlink_to((student / part).resolve())
    tensors = load_file(student / "text_encoder" / "model.safetensors")
    (folder / "text_encoder").mkdir()
    named = {name if name.startswith("text_model.") else f"text_model.{name}": value for name, value in tensors.items()}
    save_tensors(folder / "text_encoder" / "model.safetensors", named, {"format": "pt"})


def read(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A config of a diffusers model."""
    return json.loads((folder / name).read_text(encoding="utf-8"))
