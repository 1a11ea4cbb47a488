"""LoRAs that reach the text encoders too, merged when a student is loaded: as peft merges them."""

from pathlib import Path

import pytest
import tiny_students
import torch
from diffusers import PixArtTransformer2DModel, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from snoopi_rt.export.backbones import Weights, pixart_alpha, stable_diffusion
from snoopi_rt.export.guidance import GUIDANCE
from snoopi_rt.export.presets.choose import find_preset

CLIP_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
HALVES = {"A": "down", "B": "up"}


def written_by_kohya(file: Path, two: bool) -> None:
    """The file as kohya's trainer would have written it, which has the alpha of each layer in a tensor."""
    tensors: dict[str, Tensor] = {}
    for key, tensor in load_file(file).items():
        part, _, name = key.partition(".")
        layer, half = name.removesuffix(".weight").rsplit(".lora_")
        inner = "text_model." if layer.startswith(("encoder.", "embeddings.")) else ""
        prefix = "lora_te1" if two and part == "text_encoder" else PREFIXES[part]
        spelled = f"{prefix}_{(inner + layer).replace('.', '_')}"
        tensors |= {f"{spelled}.lora_{HALVES[half]}.weight": tensor, f"{spelled}.alpha": torch.tensor(8.0)}
    StableDiffusionPipeline.lora_state_dict(dict(tensors))  # refuses what it does not take for kohya's
    save_file(tensors, file)


@pytest.mark.parametrize("spelling", ["diffusers", "kohya"])
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_lora_of_network_and_text_encoders_is_merged_into_all_of_them(kind: str, spelling: str, tmp_path: Path) -> None:
    folder = tiny_students.stable_diffusion(tmp_path / "student", kind, levels=1, mid_block_type=None, tiny_vae=True)
    parts = {"unet": UNet2DConditionModel, "text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    if kind == "sd15":
        del parts["text_encoder_2"]
    expected_of, layers, about = {}, {}, {}
    for part, of in parts.items():
        model = of.from_pretrained(folder / part)
        expected_of[part] = {name: value.clone() for name, value in model.state_dict().items()}
        targets = ["to_q", "to_out.0", "conv1"] if part == "unet" else [*CLIP_LAYERS, *["text_projection"] * (part == "text_encoder_2")]
        config = LoraConfig(r=3, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        inject_adapter_in_model(config, model)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(model)
        about[f"{part}_lora_adapter_metadata"] = config.to_dict()
        for name, layer in model.named_modules():
            if hasattr(layer, "get_delta_weight"):
                expected_of[part][f"{name}.weight"] += 0.7 * layer.get_delta_weight("default").detach()
    (StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline).save_lora_weights(tmp_path, **layers, **about)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    if spelling == "kohya":
        written_by_kohya(file, kind == "sdxl")
    preset = find_preset("hyper-sdxl" if kind == "sdxl" else "sdxs-dreamshaper")
    student = stable_diffusion.load(Weights(folder, loras=((file, 0.7),)), preset, ((64, 64),))
    encoder = student.text_encoder
    models = [encoder.model] if kind == "sd15" else [encoder.model_1, encoder.model_2]
    network = student.reference(GUIDANCE["none"], torch.zeros(1, 1, 1)).network
    for model, expected in zip([network, *models], expected_of.values(), strict=True):
        merged = model.state_dict()
        assert merged.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(merged[name], value, atol=1e-5, rtol=1e-5)


def test_a_lora_of_pixarts_t5_is_added_wherever_its_weights_are_read(tmp_path: Path) -> None:
    folder = tiny_students.pixart(tmp_path / "student", num_layers=1, tiny_vae=True)
    layer = "encoder.block.1.layer.0.SelfAttention.q"
    model = T5EncoderModel.from_pretrained(folder / "text_encoder")
    weight = model.get_submodule(layer).weight
    a, b = torch.randn(3, weight.shape[1]), torch.randn(weight.shape[0], 3)
    tensors = {f"text_encoder.{layer}.lora_A.weight": a, f"text_encoder.{layer}.lora_B.weight": b}
    save_file(tensors, tmp_path / "x.safetensors")
    student = pixart_alpha.load(Weights(folder, loras=((tmp_path / "x.safetensors", 0.5),)), find_preset("pixart-dmd"), ((64, 64),))
    ids = torch.tensor([[5, 6, 7, 1]])
    with torch.no_grad():
        before = model(ids).last_hidden_state
        weight += 0.5 * b @ a
        expected = model(ids).last_hidden_state
    assert student.tensor_of is not None
    torch.testing.assert_close(student.tensor_of(f"{layer}.weight"), weight.detach())
    network = PixArtTransformer2DModel.from_pretrained(folder / "transformer")
    (states,) = student.encode([ids])
    torch.testing.assert_close(states["states"], network.caption_projection(expected).detach(), atol=1e-5, rtol=1e-4)
    assert (expected - before).abs().max() > 1e-3
