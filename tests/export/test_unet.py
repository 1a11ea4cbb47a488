"""Stable Diffusion's UNets folded for their timesteps are diffusers' networks, in PyTorch and as graphs, with every kind of guidance."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny_students
import torch
from diffusers.models.attention import BasicTransformerBlock
from onnx import numpy_helper
from onnx_nodes import node_counts
from paper_attention import KINDS, SCALES, PaperAttention
from torch import Tensor, nn

from snoopi_rt.engines import load_engine
from snoopi_rt.errors import InputError
from snoopi_rt.export.backbones.unet import FoldedUNet, GuidedUNet
from snoopi_rt.export.guidance import GUIDANCE
from snoopi_rt.export.one_step import OneStepRule
from snoopi_rt.export.onnx_graphs.write import write_graph
from snoopi_rt.export.student_graphs import dynamic_axes

UNETS = ("sd15", "sd21", "sdxl")
X0 = OneStepRule("x0", 999, 0.0, 1.0)
RULES = {
    "epsilon": OneStepRule("epsilon", 399, 0.65275, 0.75757),
    "three steps": OneStepRule(
        "epsilon", 999, 0.3, 0.954, later=(OneStepRule("epsilon", 499, 0.527, 0.85), OneStepRule("epsilon", 249, 0.817, 0.577))
    ),
}
TWO_STEPS = OneStepRule("epsilon", 999, 0.3, 0.954, later=(OneStepRule("epsilon", 499, 0.527, 0.85, kept=0.5),), end=(0.9996, 0.03))
TIME_IDS = torch.tensor([[64.0, 96.0, 1.0, 2.0, 32.0, 48.0]])
ONE_LAYER: dict[str, Any] = {"levels": 1, "mid_block_type": None, "up_block_types": ("UpBlock2D",)}
"""As little as has a cross-attention."""


def width(unet: str) -> int:
    return 80 if unet == "sdxl" else 32


def empty(unet: str) -> Tensor:
    return torch.randn(1, 7, width(unet), generator=torch.Generator().manual_seed(2))


def inputs(unet: str, steps: int = 1) -> dict[str, Tensor]:
    """One image for each of SCALES, and states of 7 tokens large enough to matter."""
    random, batch = torch.Generator().manual_seed(1), len(SCALES)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=random)

    arguments = {"noise": draw(4, 8, 8), "prompt_states": 2 * draw(7, width(unet)), "negative_states": 2 * draw(7, width(unet))}
    arguments["negative_scale"] = torch.tensor(SCALES)
    if unet == "sdxl":
        arguments["prompt_pooled"] = draw(24)
    if steps > 1:
        arguments["renoise"] = draw(steps - 1, 4, 8, 8)
    return arguments


def folded(unet: str, network: Any, rule: OneStepRule, kind: str, scale: float = 1.0) -> nn.Module:
    return FoldedUNet(network, rule, GUIDANCE[kind], empty(unet), TIME_IDS if unet == "sdxl" else None, scale).eval()


def by_diffusers(
    unet: str, network: Any, rule: OneStepRule, kind: str, arguments: dict[str, Tensor], condition: Tensor | None = None
) -> Tensor:
    """The latent by diffusers' own network with the paper's formula in every attention."""
    network.set_attn_processor(PaperAttention(kind, arguments["negative_states"], arguments["negative_scale"], empty(unet)))
    added = {}
    if unet == "sdxl":
        added = {"text_embeds": arguments["prompt_pooled"], "time_ids": TIME_IDS.expand(len(SCALES), -1)}

    def predict(step: int, latent: Tensor) -> Tensor:
        states = arguments["prompt_states"]
        timestep = rule.steps[step].timestep
        return network(latent, timestep, states, timestep_cond=condition, added_cond_kwargs=added, return_dict=False)[0]

    with torch.no_grad():
        return rule.run(predict, arguments["noise"], arguments.get("renoise"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unet", UNETS)
def test_the_folded_network_is_diffusers_own_with_the_papers_formula_in_every_layer(unet, kind):
    network, arguments = tiny_students.unet(unet), inputs(unet)
    expected = by_diffusers(unet, network, RULES["epsilon"], kind, arguments)
    with torch.no_grad():
        latent = folded(unet, network, RULES["epsilon"], kind)(**arguments)
    torch.testing.assert_close(latent, expected, atol=2e-5, rtol=1e-4)
    none = by_diffusers(unet, network, RULES["epsilon"], "none", arguments)
    changed = (expected - none).flatten(1).abs().amax(1)
    assert changed[0] == 0 and (changed[1:] > 1e-3).all()


@pytest.mark.parametrize("unet", UNETS)
def test_several_steps_share_all_weights_and_each_has_its_own_timestep(unet):
    network, arguments, rule = tiny_students.unet(unet), inputs(unet, 3), RULES["three steps"]
    expected = by_diffusers(unet, network, rule, "nasa", arguments)
    module = folded(unet, network, rule, "nasa")
    with torch.no_grad():
        latent = module(**arguments)
    torch.testing.assert_close(latent, expected, atol=5e-5, rtol=1e-4)
    stored = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    own = [name for name, parameter in module.named_parameters() if parameter.untyped_storage().data_ptr() not in stored]
    # The convolutions' biases; of SDXL the one product that stands for all blocks' and what is left of the first.
    assert all((".conv1." in name and name.endswith("bias")) or name.startswith("prompt_shift.") for name in own)
    same = OneStepRule("epsilon", 999, 0.3, 0.954, later=tuple(OneStepRule("epsilon", 999, s.alpha, s.sigma) for s in rule.later))
    with torch.no_grad():
        assert (folded(unet, network, same, "nasa")(**arguments) - latent).abs().max() > 1e-3


SDXL_LEVELS = {
    "block_out_channels": (16, 16, 32),
    "attention_head_dim": (2, 2, 4),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
# As their configs describe them, but for the widths; BK-SDM's are in its repository, the others' in programs that rebuild them.
PRUNED: dict[str, tuple[str, dict[str, Any]]] = {
    "BK-SDM base": (
        "sd15",
        {
            "block_out_channels": (8, 8, 16, 16),
            "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        },
    ),
    "BK-SDM tiny": (
        "sd15",
        {
            "block_out_channels": (8, 8, 16),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3,
            "mid_block_type": None,
            "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        },
    ),
    "SSD-1B": (
        "sdxl",
        {
            **SDXL_LEVELS,
            "transformer_layers_per_block": [[1], [2, 2], [1, 2]],
            "reverse_transformer_layers_per_block": [[1, 2, 3], [2, 1, 1], 1],
        },
    ),
    "Segmind-Vega": ("sdxl", {**SDXL_LEVELS, "transformer_layers_per_block": [1, 1, 2]}),
}


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_networks_are_folded_as_their_configs_describe_them(name: str) -> None:
    unet, config = PRUNED[name]
    network, arguments = tiny_students.unet(unet, **config), inputs(unet)
    expected = by_diffusers(unet, network, X0, "nasa", arguments)
    with torch.no_grad():
        latent = folded(unet, network, X0, "nasa")(**arguments)
    torch.testing.assert_close(latent, expected, atol=2e-5, rtol=1e-4)


def test_the_guidance_that_an_lcm_is_fed_is_a_constant_of_its_graph() -> None:
    network, arguments, width = tiny_students.unet("sd15", time_cond_proj_dim=8), inputs("sd15"), 8
    angles = 1000 * (8.5 - 1) * 10000 ** (-torch.arange(width // 2) / (width // 2 - 1))
    condition = torch.cat([angles.sin(), angles.cos()])[None]
    expected = by_diffusers("sd15", network, X0, "nasa", arguments, condition)
    with torch.no_grad():
        latent = folded("sd15", network, X0, "nasa", 8.5)(**arguments)
        reference = GuidedUNet(network, X0, GUIDANCE["nasa"], empty("sd15"), embedded_guidance=8.5)(**arguments)
        other = folded("sd15", network, X0, "nasa", 4.5)(**arguments)
    torch.testing.assert_close(latent, expected, atol=1e-4, rtol=1e-3)  # the sine of 7500 in float32
    torch.testing.assert_close(latent, reference, atol=2e-5, rtol=1e-4)
    assert (latent - other).abs().max() > 1e-3


def test_a_negatives_keys_are_normalised_as_a_prompts_are():
    network, arguments = tiny_students.unet("sd21"), inputs("sd21")
    for name, module in network.named_modules():
        if name.endswith("attn2"):
            size = module.to_q.out_features // module.heads
            module.norm_q, module.norm_k = (nn.LayerNorm(size, elementwise_affine=False) for _ in range(2))
    expected = by_diffusers("sd21", network, X0, "nasa", arguments)
    with torch.no_grad():
        latent = folded("sd21", network, X0, "nasa")(**arguments)
        plain = folded("sd21", tiny_students.unet("sd21"), X0, "nasa")(**arguments)
    torch.testing.assert_close(latent, expected, atol=2e-5, rtol=1e-4)
    assert (latent - plain).abs().max() > 1e-3


def test_folding_leaves_the_network_as_it_was():
    network, arguments = tiny_students.unet("sdxl"), inputs("sdxl")
    before = by_diffusers("sdxl", network, X0, "nasa", arguments)
    folded("sdxl", network, X0, "nasa")(**arguments)
    assert torch.equal(by_diffusers("sdxl", network, X0, "nasa", arguments), before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"class_embed_type": "timestep"}, "this UNet has class_embed_type 'timestep', which is not supported"),
        ({"resnet_time_scale_shift": "scale_shift"}, "this UNet has resnet_time_scale_shift 'scale_shift', which is not supported"),
    ],
)
def test_a_unet_of_another_kind_is_refused(config, message):
    with pytest.raises(InputError, match=message):
        folded("sd15", tiny_students.unet("sd15", **config), X0, "nasa")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("unets")


@pytest.fixture(scope="module")
def graph_of(folder: Path) -> Callable[[str, str], Path]:
    """The graph of a UNet of one cross-attention and a kind of guidance, written once."""

    def graph(unet: str, kind: str) -> Path:
        path = folder / f"{unet}-{kind}.onnx"
        if not path.exists():
            arguments = {name: value for name, value in inputs(unet).items() if kind != "none" or "negative" not in name}
            module = folded(unet, tiny_students.unet(unet, **ONE_LAYER), X0, kind)
            write_graph(module, arguments, ("latent",), dynamic_axes(((64, 64),), False), path)
        return path

    return graph


def run(path: Path, arguments: dict[str, Tensor], engine: str = "cpu") -> np.ndarray:
    opened = load_engine(engine, path)
    return opened(**{spec.name: arguments[spec.name].numpy() for spec in opened.inputs})["latent"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unet", UNETS)
def test_the_graph_is_the_papers_formula_and_at_scale_zero_the_graph_without_negatives_bit_for_bit(graph_of, unet, kind):
    arguments = inputs(unet)
    latent, plain = run(graph_of(unet, kind), arguments), run(graph_of(unet, "none"), arguments)
    expected = by_diffusers(unet, tiny_students.unet(unet, **ONE_LAYER), X0, kind, arguments)
    np.testing.assert_allclose(latent, expected.numpy(), atol=2e-5, rtol=1e-4)
    assert np.array_equal(latent[0], plain[0])  # its scale is 0
    assert np.array_equal(run(graph_of(unet, kind), {**arguments, "negative_scale": torch.zeros(len(SCALES))}), plain)


@pytest.mark.parametrize("unet", UNETS)
def test_every_engine_agrees_and_a_batch_does_not_change_an_image(graph_of, unet):
    arguments = inputs(unet)
    together = run(graph_of(unet, "nasa"), arguments)
    np.testing.assert_allclose(run(graph_of(unet, "nasa"), arguments, "openvino"), together, atol=5e-5, rtol=1e-4)
    alone = run(graph_of(unet, "nasa"), {name: value[2:3] for name, value in arguments.items()})
    np.testing.assert_allclose(alone[0], together[2], atol=1e-5)


@pytest.mark.parametrize("unet", UNETS)
def test_the_timestep_is_folded_into_the_convolutions(graph_of, unet):
    network = tiny_students.unet(unet, **ONE_LAYER)
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    blocks = [module for module in network.modules() if isinstance(module, BasicTransformerBlock)]
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear) and "emb" not in name]
    for kind in ("nasa", "none"):
        counts = node_counts(graph_of(unet, kind))
        assert not {"Sin", "Cos"} & counts.keys()
        assert counts["Conv"] == len(convolutions)
        added = 3 if unet == "sdxl" else 0  # the pooled states' two, and one for all blocks
        assert counts.get("Gemm", 0) == added
        # One more for each GEGLU, whose halves are two products; and two for each cross-attention.
        assert counts["MatMul"] == len(linear) + len(blocks) + 2 * (1 + (kind == "nasa"))
        assert counts["Attention"] == 1


def test_a_graph_of_two_steps_holds_every_weight_once(folder):
    network, arguments = tiny_students.unet("sd21", **ONE_LAYER), inputs("sd21", 2)
    module, path = folded("sd21", network, TWO_STEPS, "nasa"), folder / "two.onnx"
    write_graph(module, arguments, ("latent",), dynamic_axes(((64, 64),), False), path)
    with torch.no_grad():
        np.testing.assert_allclose(run(path, arguments), module(**arguments).numpy(), atol=5e-5, rtol=1e-4)
    matrices = [numpy_helper.to_array(matrix) for matrix in onnx.load(path).graph.initializer]
    matrices = [matrix for matrix in matrices if matrix.ndim > 1]
    # A matrix may be stored transposed: the same numbers in another order.
    assert len(matrices) == len({np.sort(matrix, axis=None).tobytes() for matrix in matrices})
