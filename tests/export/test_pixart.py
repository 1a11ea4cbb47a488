"""PixArt folded for one timestep is diffusers' network, in PyTorch and as a graph, with every kind of guidance."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_students
import torch
from onnx_nodes import node_counts
from paper_attention import KINDS, SCALES, PaperAttention
from torch import Tensor

from snoopi_rt.engines import load_engine
from snoopi_rt.export.backbones.pixart import FoldedPixArt
from snoopi_rt.export.guidance import GUIDANCE
from snoopi_rt.export.one_step import OneStepRule
from snoopi_rt.export.onnx_graphs.write import write_graph
from snoopi_rt.export.student_graphs import dynamic_axes
from snoopi_rt.kernels import attention, fused_attention, transposed_attention

RULES = {
    "v": OneStepRule("v", timestep=999, alpha=0.1, sigma=0.995),
    "epsilon": OneStepRule("epsilon", timestep=400, alpha=0.43997, sigma=0.89801),
    "two steps": OneStepRule("epsilon", 400, 0.43997, 0.89801, later=(OneStepRule("epsilon", 100, 0.94, 0.34),)),
}
WIDTH = 48
EMPTY = torch.randn(1, 2, WIDTH, generator=torch.Generator().manual_seed(2))


def network(sample_size: int = 8, **config):
    made = tiny_students.pixart_network(sample_size, **config)
    made.caption_projection = None
    return made


def inputs(masked: bool = False, latent=(4, 8, 8), steps: int = 1) -> dict[str, Tensor]:
    """One image for each of SCALES, the states of a prompt of 5 and a negative of 3 tokens large enough to matter."""
    random, batch = torch.Generator().manual_seed(1), len(SCALES)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=random)

    arguments = {"noise": draw(*latent), "prompt_states": 2 * draw(5, WIDTH), "negative_states": 2 * draw(3, WIDTH)}
    arguments["negative_scale"] = torch.tensor(SCALES)
    if masked:
        arguments["prompt_mask"] = torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]
        arguments["negative_mask"] = torch.arange(3) < torch.tensor([3, 3, 2, 1])[:, None]
    if steps > 1:
        arguments["renoise"] = draw(steps - 1, *latent)
    return arguments


def by_diffusers(made, rule: OneStepRule, kind: str, arguments: dict[str, Tensor], size=(64, 64)) -> Tensor:
    """The latent by diffusers' own network with the paper's formula in every attention."""
    made.set_attn_processor(
        PaperAttention(kind, arguments["negative_states"], arguments["negative_scale"], EMPTY, arguments.get("negative_mask"))
    )
    batch, conditions = len(arguments["noise"]), {"resolution": None, "aspect_ratio": None}
    if made.config.use_additional_conditions:
        conditions = {
            "resolution": torch.tensor([size]).float().expand(batch, -1),
            "aspect_ratio": torch.full((batch, 1), size[0] / size[1]),
        }

    def predict(step: int, latent: Tensor) -> Tensor:
        mask = arguments.get("prompt_mask")
        return made(
            latent,
            arguments["prompt_states"],
            torch.full((batch,), rule.steps[step].timestep),
            conditions,
            encoder_attention_mask=None if mask is None else mask.float(),
            return_dict=False,
        )[0][:, : latent.shape[1]]

    with torch.no_grad():
        return rule.run(predict, arguments["noise"], arguments.get("renoise"))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_folded_network_is_diffusers_own_with_the_papers_formula_in_every_layer(kind, masked):
    made, arguments = network(), inputs(masked)
    expected = by_diffusers(made, RULES["epsilon"], kind, arguments)
    with torch.no_grad():
        folded = FoldedPixArt(made, RULES["epsilon"], GUIDANCE[kind], EMPTY, (64, 64))(**arguments)
    torch.testing.assert_close(folded, expected, atol=2e-5, rtol=1e-4)
    none = by_diffusers(made, RULES["epsilon"], "none", arguments)
    changed = (expected - none).flatten(1).abs().amax(1)
    assert changed[0] == 0 and (changed[1:] > 1e-2).all()


@pytest.mark.parametrize("sample_size", [8, 128])  # 128: conditioned on resolution and aspect ratio, and a grid that is not its own
@pytest.mark.parametrize("out_channels", [4, 8])  # 8: the network also learns the variance
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_and_form_of_pixart_is_folded(rule, out_channels, sample_size):
    made = network(sample_size, out_channels=out_channels)
    arguments = inputs(latent=(4, 8, 12), steps=len(RULES[rule].steps))
    expected = by_diffusers(made, RULES[rule], "nasa", arguments, (64, 96))
    with torch.no_grad():
        folded = FoldedPixArt(made, RULES[rule], GUIDANCE["nasa"], EMPTY, (64, 96))(**arguments)
    torch.testing.assert_close(folded, expected, atol=5e-5, rtol=1e-4)
    assert expected.std() > 0.1


def test_a_different_timestep_and_a_different_size_give_a_different_folded_network():
    made, arguments = network(128), inputs()
    with torch.no_grad():
        first, *others = (
            FoldedPixArt(made, OneStepRule("x0", t, 0.0, 1.0), GUIDANCE["nasa"], EMPTY, size)(**arguments)
            for t, size in ((400, (64, 64)), (399, (64, 64)), (400, (64, 72)))
        )
    assert all((other - first).abs().max() > 1e-4 for other in others)


# How attention is computed, opset, masks, blocks: as for the public checkpoints, and as for the backbone `small`.
BACKBONES = {"pixart": ((fused_attention, transposed_attention), 23, False, 2), "small": ((attention, attention), 20, True, 1)}
X0 = OneStepRule("x0", 400, 0.0, 1.0)


@pytest.fixture(scope="module", params=BACKBONES)
def backbone(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def graph_of(backbone: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The graph of a kind of guidance, written once."""
    folder, (attends, opset, masked, blocks) = tmp_path_factory.mktemp(backbone), BACKBONES[backbone]

    def graph(kind: str) -> Path:
        path = folder / f"{kind}.onnx"
        if not path.exists():
            arguments = {name: value for name, value in inputs(masked).items() if kind != "none" or "negative" not in name}
            module = FoldedPixArt(network(num_layers=blocks), X0, GUIDANCE[kind], EMPTY, (64, 64), *attends)
            write_graph(module, arguments, ("latent",), dynamic_axes(((64, 64),), False), path, opset=opset)
        return path

    return graph


def run(path: Path, arguments: dict[str, Tensor], engine: str = "cpu") -> np.ndarray:
    opened = load_engine(engine, path)
    return opened(**{spec.name: arguments[spec.name].numpy() for spec in opened.inputs})["latent"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_is_the_papers_formula_and_at_scale_zero_the_graph_without_negatives_bit_for_bit(backbone, graph_of, kind):
    _, _, masked, blocks = BACKBONES[backbone]
    arguments = inputs(masked)
    latent = run(graph_of(kind), arguments)
    np.testing.assert_allclose(latent, by_diffusers(network(num_layers=blocks), X0, kind, arguments).numpy(), atol=2e-5, rtol=1e-4)
    plain = run(graph_of("none"), arguments)
    assert np.array_equal(latent[0], plain[0])  # its scale is 0
    off = run(graph_of(kind), {**arguments, "negative_scale": torch.zeros(len(SCALES))})
    assert np.array_equal(off, plain)


def test_every_engine_agrees(backbone, graph_of):
    arguments = inputs(BACKBONES[backbone][2])
    np.testing.assert_allclose(run(graph_of("nasa"), arguments, "openvino"), run(graph_of("nasa"), arguments), atol=5e-5, rtol=1e-4)


def test_a_batch_does_not_change_an_image(backbone, graph_of):
    arguments = inputs(BACKBONES[backbone][2])
    together = run(graph_of("nasa"), arguments)
    alone = run(graph_of("nasa"), {name: value[2:3] for name, value in arguments.items()})
    np.testing.assert_allclose(alone[0], together[2], atol=1e-5)


def test_modulations_are_in_norms_and_projections_and_keys_of_both_prompts_are_one_product(backbone, graph_of):
    attends, _, _, blocks = BACKBONES[backbone]
    fused = attends[0] is fused_attention
    for kind in ("nasa", "none"):
        counts, written_out = node_counts(graph_of(kind)), blocks * (1 + (kind == "nasa") + (not fused))
        assert not {"Sin", "Cos", "Sigmoid", "Gemm"} & counts.keys()  # neither timestep nor positions are computed
        assert counts["LayerNormalization"] == 2 * blocks + 1
        # query, key, value and out of both attentions, widen, narrow, and two products an attention; then the last projection
        assert counts["MatMul"] == 10 * blocks + 1 + 2 * written_out
        assert counts.get("Attention", 0) == blocks * fused
        assert counts["Conv"] == 1
    if fused:
        # A bias a product, three residuals; the positions. Nothing multiplies or shifts but that.
        assert counts["Add"] == blocks * (10 + 3) + 1 + 1
        assert counts["Mul"] == blocks  # keys by 1 / sqrt(d)
