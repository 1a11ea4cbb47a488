"""LoRAs merged at export: as diffusers fuses them, and by the formula where diffusers cannot."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from snoopi_rt.errors import InputError
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.export.weights.lora import NETWORK, merge_loras, parse_lora

EVERY_LAYER = (
    "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2 conv1 conv2 conv_shortcut conv_in conv_out time_emb_proj "
    "downsamplers.0.conv upsamplers.0.conv time_embedding.linear_1 time_embedding.linear_2 add_embedding.linear_1 add_embedding.linear_2"
)


def tiny_unet(blocks: int = 2, layers: int = 1, linear: bool = False) -> UNet2DConditionModel:
    extra = (
        {"addition_embed_type": "text_time", "addition_time_embed_dim": 2, "projection_class_embeddings_input_dim": 20} if linear else {}
    )
    return UNet2DConditionModel(
        block_out_channels=(8, 16, 24)[:blocks],
        layers_per_block=layers,
        sample_size=8,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (blocks - 1)),
        up_block_types=(*["CrossAttnUpBlock2D"] * (blocks - 1), "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        use_linear_projection=linear,
        **extra,
    ).requires_grad_(False)


def tiny_pixart() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, sample_size=8, caption_channels=8
    ).requires_grad_(False)


def clone(network: nn.Module) -> nn.Module:
    copy = type(network).from_config(network.config).requires_grad_(False)
    copy.load_state_dict(network.state_dict())
    return copy


def random_pairs(network: nn.Module, rank: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    """A pair (A, B) for each layer of the network that can have one."""
    pairs = {}
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            out, *rest = layer.weight.shape
            pairs[name] = torch.randn(rank, *rest), torch.randn(out, rank, *[1] * (len(rest) - 1))
    return pairs


def assert_merged(network: nn.Module, base: nn.Module, pairs: dict[str, tuple[Tensor, Tensor]], scale: float) -> None:
    assert len(pairs) > 5
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            expected = base.get_submodule(name).weight
            if name in pairs:
                expected = expected + scale * torch.einsum(
                    "or...,ri...->oi...", pairs[name][1].expand(-1, -1, *expected.shape[2:]), pairs[name][0]
                )
            torch.testing.assert_close(layer.weight, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_of_diffusers_merges_as_diffusers_fuses_it(rslora: bool, tmp_path: Path) -> None:
    """Its alpha stands in the file's metadata alone; the answers of both networks are compared too."""
    unet = tiny_unet()
    ours, theirs = clone(unet), clone(unet)
    targets = [name for name in EVERY_LAYER.split() if "add_embedding" not in name]
    config = LoraConfig(r=3, lora_alpha=8, alpha_pattern={"to_q": 5}, target_modules=targets, init_lora_weights=False, use_rslora=rslora)
    unet.add_adapter(config)
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(unet), unet_lora_adapter_metadata=config.to_dict()
    )
    file = tmp_path / "pytorch_lora_weights.safetensors"
    merge_loras([(file, 0.7)], {NETWORK: ours})
    theirs.load_lora_adapter(tmp_path, weight_name=file.name, prefix="unet")
    theirs.fuse_lora(lora_scale=0.7)
    theirs.unload_lora()
    for name, expected in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], expected, atol=1e-6, rtol=1e-5)
    arguments = torch.randn(1, 4, 8, 8), torch.tensor([999]), torch.randn(1, 7, 8)
    with torch.no_grad():
        torch.testing.assert_close(ours(*arguments).sample, theirs(*arguments).sample, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours.conv_in.weight, unet.conv_in.base_layer.weight)


SPELLINGS = {
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", "base_model.model.{}.alpha", "."),
    "peft named": ("{}.lora_A.default.weight", "{}.lora_B.default.weight", "{}.alpha", "."),
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", "transformer.{}.alpha", "."),
    "diffusers before peft": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight", "unet.{}.alpha", "."),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha", "_"),
}


@pytest.mark.parametrize("make", [tiny_pixart, tiny_unet], ids=["pixart", "unet"])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_every_layer_of_every_spelling_gets_its_product(spelling: str, alpha: float | None, make, tmp_path: Path) -> None:
    down, up, scaling, dot = SPELLINGS[spelling]
    network = make()
    base, pairs = clone(network), random_pairs(network)
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():
        spelled = name.replace(".", dot)
        tensors |= {down.format(spelled): a, up.format(spelled): b}
        if alpha is not None:
            tensors[scaling.format(spelled)] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "x.safetensors")
    merge_loras([(tmp_path / "x.safetensors", 0.5)], {NETWORK: network})
    assert_merged(network, base, pairs, 0.5 * (3 if alpha is None else alpha) / 3)


def test_the_alpha_of_peft_is_read_from_the_config_beside(tmp_path: Path) -> None:
    network = tiny_pixart()
    base, pairs = clone(network), random_pairs(network)
    tensors = {f"base_model.model.{name}.lora_{half}.weight": x for name, pair in pairs.items() for half, x in zip("AB", pair, strict=True)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 12}))
    merge_loras([(tmp_path / "adapter_model.safetensors", 1.0)], {NETWORK: network})
    assert_merged(network, base, pairs, 4.0)


def test_attention_processors_of_former_diffusers_are_the_layers_they_stand_for(tmp_path: Path) -> None:
    network = tiny_unet()
    base = clone(network)
    tensors: dict[str, Tensor] = {}
    pairs = {name: pair for name, pair in random_pairs(network).items() if ".attn" in name}
    for name, (a, b) in pairs.items():
        head, _, last = name.removesuffix(".0").rpartition(".")
        tensors |= {f"unet.{head}.processor.{last}_lora.down.weight": a, f"unet.{head}.processor.{last}_lora.up.weight": b}
    assert any("to_out_lora" in name for name in tensors)
    save_file(tensors, tmp_path / "x.safetensors")
    merge_loras([(tmp_path / "x.safetensors", 1.0)], {NETWORK: network})
    assert_merged(network, base, pairs, 1.0)


# The layers of SDXL's UNet in the original code, from its config: channels change at resnet 4, blocks of two, no attention in the first.
ORIGINAL = """
input_blocks.0.0 input_blocks.1.0.in_layers.2 input_blocks.3.0.op input_blocks.4.0.skip_connection input_blocks.4.0.emb_layers.1
input_blocks.4.1.proj_in input_blocks.5.1.transformer_blocks.0.attn1.to_q input_blocks.6.0.op input_blocks.7.1.proj_out
input_blocks.8.1.transformer_blocks.0.ff.net.0.proj middle_block.0.in_layers.2 middle_block.1.transformer_blocks.0.attn2.to_k
middle_block.2.out_layers.3 output_blocks.0.1.transformer_blocks.0.attn2.to_out.0 output_blocks.2.2.conv output_blocks.3.0.skip_connection
output_blocks.5.1.proj_in output_blocks.5.2.conv output_blocks.6.0.emb_layers.1 output_blocks.8.0.out_layers.3
time_embed.0 time_embed.2 label_emb.0.0 label_emb.0.2 out.2
"""


def test_kohyas_names_of_sdxl_layers_mean_what_diffusers_takes_them_for(tmp_path: Path) -> None:
    network = tiny_unet(blocks=3, layers=2, linear=True)
    base, known, pairs = clone(network), random_pairs(network), {}
    tensors: dict[str, Tensor] = {}
    for name in ORIGINAL.split():
        keys = [f"lora_unet_{name.replace('.', '_')}.lora_{half}.weight" for half in ("down", "up")]
        converted, _ = StableDiffusionXLPipeline.lora_state_dict({key: torch.empty(1) for key in keys}, unet_config=network.config)
        (layer,) = {key.removeprefix("unet.").partition(".lora_")[0] for key in convert_unet_state_dict_to_peft(converted)}
        pairs[layer] = known[layer]
        tensors |= dict(zip(keys, known[layer], strict=True))
    assert len(pairs) == len(ORIGINAL.split())
    save_file(tensors, tmp_path / "x.safetensors")
    merge_loras([(tmp_path / "x.safetensors", 1.0)], {NETWORK: network})
    assert_merged(network, base, pairs, 1.0)


A, B = torch.ones(2, 4, 3, 3), torch.ones(8, 2, 1, 1)
CONV_IN = {"unet.conv_in.lora_A.weight": A, "unet.conv_in.lora_B.weight": B}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": A}, "without a layer: 1 .lora_te_text_model_encoder"),
        ({"unet.conv_in.lora_magnitude_vector": B}, "without a layer: 1 .unet.conv_in.lora_magnitude_vector"),
        ({"lora_unet_conv_in.dora_scale": B}, "without a layer: 1 .lora_unet_conv_in.dora_scale"),
        ({"lora_unet_conv_in.hada_w1_a": B}, "without a layer: 1 .lora_unet_conv_in.hada_w1_a"),
        ({"unet.conv_in.lora_B.bias": B}, "without a layer: 1 .unet.conv_in.lora_B.bias"),
        ({f"transformer.blocks.{i}.lora_A.weight": A for i in range(9)}, "without a layer: 9 .*blocks.4.lora_A.weight, ..."),
        ({"unet.conv_out.lora_A.weight": A}, "its pair for conv_out is not one for shape"),
        ({"unet.conv_out.lora_A.weight": A, "unet.conv_out.lora_B.weight": B}, "its pair for conv_out is not one for shape"),
    ],
    ids=["text encoder", "DoRA", "DoRA of kohya", "LoHa", "bias", "another network", "half a pair", "another shape"],
)
def test_a_lora_that_does_not_fit_is_refused_and_nothing_is_merged(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    network = tiny_unet()
    base = clone(network)
    save_file({key: tensor.clone() for key, tensor in (CONV_IN | tensors).items()}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=message):
        merge_loras([(tmp_path / "x.safetensors", 1.0)], {NETWORK: network})
    assert all(
        torch.equal(merged, expected) for merged, expected in zip(network.state_dict().values(), base.state_dict().values(), strict=True)
    )


def test_a_merge_leaves_the_file_of_the_weights_as_it_was(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    before = file.read_bytes()
    network = load_module(tmp_path, UNet2DConditionModel)
    save_file(CONV_IN, tmp_path / "x.safetensors")
    merge_loras([(tmp_path / "x.safetensors", 1.0)], {NETWORK: network})
    assert torch.equal(network.conv_in.weight, load_file(file)["conv_in.weight"] + 2)
    assert file.read_bytes() == before


def test_a_pickled_state_dict_is_merged_and_anything_else_refused(tmp_path: Path) -> None:
    torch.save(CONV_IN, tmp_path / "x.pt")
    network = tiny_unet()
    before = network.conv_in.weight.clone()
    merge_loras([(tmp_path / "x.pt", 1.0)], {NETWORK: network})
    assert torch.equal(network.conv_in.weight, before + 2)
    for content, message in (({"state": CONV_IN}, "or more than tensors"), (Path.cwd, "is not a plain state dict of torch")):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(InputError, match=message):
            merge_loras([(tmp_path / "x.pt", 1.0)], {NETWORK: tiny_unet()})


def test_file_and_weight_are_told_apart_also_with_colons_in_the_path(tmp_path: Path) -> None:
    plain, colon = tmp_path / "x.safetensors", tmp_path / "style:0.5"
    plain.touch()
    colon.touch()
    for text, expected in [
        (f"{plain}", (plain, 1.0)),
        (f"{plain}:0.8", (plain, 0.8)),
        (f"{plain}:-1", (plain, -1.0)),
        (f"{plain}:0", (plain, 0.0)),
        (f"{colon}", (colon, 1.0)),
        (f"{colon}:2", (colon, 2.0)),
    ]:
        assert parse_lora(text) == expected
    for text, message in [
        (f"{plain}:strong", f"no LoRA file {plain}:strong"),
        (f"{plain}:", f"no LoRA file {plain}:"),
        (f"{tmp_path}/absent:0.5", f"no LoRA file {tmp_path}/absent: give"),
        (f"{plain}:nan", "must be a finite number"),
        (f"{plain}:inf", "must be a finite number"),
        ("C:\\loras\\x.safetensors", "no LoRA file C:"),
    ]:
        with pytest.raises(InputError, match=message.replace("\\", ".")):
            parse_lora(text)


def test_a_lora_without_tensors_or_for_a_part_that_is_not_there_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({}, file)
    with pytest.raises(InputError, match="holds no tensors, or more than tensors"):
        merge_loras([(file, 1.0)], {NETWORK: tiny_unet()})
    save_file(CONV_IN | {"unet.conv_in.alpha": torch.tensor(torch.nan)}, file)
    with pytest.raises(InputError, match="what it holds of conv_in is not finite"):
        merge_loras([(file, 1.0)], {NETWORK: tiny_unet()})
    layer = "encoder.layers.0.mlp.fc1"
    models = [nn.Sequential() for _ in range(2)]
    for model in models:
        model.add_module("encoder", nn.Module())
        model.encoder.layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(4, 4)})})])
    pair = {f"base_model.model.{layer}.lora_A.weight": torch.ones(1, 4), f"base_model.model.{layer}.lora_B.weight": torch.ones(4, 1)}
    save_file(pair, file)
    both = {"text_encoder": models[0], "text_encoder_2": models[1]}
    with pytest.raises(InputError, match="keys without a layer: 2"):  # of which of the two it is, nobody says
        merge_loras([(file, 1.0)], {NETWORK: tiny_unet(), **both})
    before = models[0].get_submodule(layer).weight.detach()
    merge_loras([(file, 1.0)], {NETWORK: tiny_unet(), "text_encoder": models[0]})
    torch.testing.assert_close(models[0].get_submodule(layer).weight, before + 1)
