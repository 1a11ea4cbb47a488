"""Export: the folded network is diffusers' network, the graphs are the folded network, and a bundle is whole or not there."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_nodes import node_counts

from snoopi_rt.bundle import verify
from snoopi_rt.engines import installed, load_engine
from snoopi_rt.errors import InputError, OutputError
from snoopi_rt.export.backbones.pixart import FoldedPixArt, GuidedPixArt
from snoopi_rt.export.exporter import export as write
from snoopi_rt.export.guidance import GUIDANCE
from snoopi_rt.export.one_step import OneStepRule
from snoopi_rt.export.onnx_graphs import parity
from snoopi_rt.export.options import ExportOptions
from snoopi_rt.export.source import find_source

SIZE = (128, 128)


WITHOUT_TEXT_ENCODER = {"prompts": ("a cat",), "prompts_only": True}
"""What is quicker where the other graphs are looked at."""


def export(weights, out, backbone, guidance="nasa", **options):
    return write(find_source(backbone, str(weights)), out, ExportOptions(guidance, **options))


RULES = {
    "v": OneStepRule("v", timestep=999, alpha=0.0, sigma=1.0),
    "epsilon": OneStepRule("epsilon", timestep=400, alpha=0.43997, sigma=0.89801),
}


def small_network(out_channels: int = 8):
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    network = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8,
        out_channels=out_channels,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=16,
        patch_size=2,
        caption_channels=24,
        use_additional_conditions=False,
    ).eval()
    network.caption_projection = None
    return network


def inputs(batch: int = 3):
    random = torch.Generator().manual_seed(1)
    lengths = torch.tensor([[5, 3, 1][i % 3] for i in range(batch)])
    negatives = torch.tensor([[2, 4, 4][i % 3] for i in range(batch)])
    return {
        "noise": torch.randn(batch, 8, 16, 16, generator=random),
        "prompt_states": torch.randn(batch, 5, 32, generator=random),
        "prompt_mask": torch.arange(5) < lengths[:, None],
        "negative_states": torch.randn(batch, 4, 32, generator=random),
        "negative_mask": torch.arange(4) < negatives[:, None],
        "negative_scale": torch.tensor([[0.0, 0.5, 1.5][i % 3] for i in range(batch)]),
    }


@pytest.mark.parametrize("out_channels", [8, 16])  # 16: the network also learns the variance
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["nasa", "projected"])
def test_the_folded_network_is_diffusers_own(kind, rule, out_channels):
    network, empty = small_network(out_channels), torch.randn(1, 2, 32)
    with torch.no_grad():
        folded = FoldedPixArt(network, RULES[rule], GUIDANCE[kind], empty, SIZE)(**inputs())
        reference = GuidedPixArt(network, RULES[rule], GUIDANCE[kind], empty, SIZE)(**inputs())
    torch.testing.assert_close(folded, reference, atol=2e-5, rtol=1e-4)
    assert reference.std() > 0.1


def test_a_different_timestep_gives_a_different_folded_network():
    network, empty = small_network(), torch.randn(1, 2, 32)
    with torch.no_grad():
        a, b = (FoldedPixArt(network, OneStepRule("x0", t, 0.0, 1.0), GUIDANCE["nasa"], empty, SIZE)(**inputs()) for t in (999, 400))
    assert (a - b).abs().max() > 1e-3


HASHED: list[Path] = []


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, tiny_student):
    root = tmp_path_factory.mktemp("bundles")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "sha256", lambda path, sha256=verify.sha256: HASHED.append(path) or sha256(path))
        plain = export(tiny_student, root / "none", "small", "none", **WITHOUT_TEXT_ENCODER)
        return {"nasa": export(tiny_student, root / "nasa", "small"), "none": plain}


def test_an_export_hashes_each_graph_once(bundles):
    hashed = [path.name for path in HASHED if path.parent.name == ".nasa.part" and "onnx" in path.name]
    listed = {file.path for variants in bundles["nasa"].graphs.values() for variant in variants for file in variant.files}
    assert sorted(hashed) == sorted(listed)


def generator_of(bundle, engine="cpu"):
    return load_engine(engine, bundle.folder / "generator-fp16.onnx")


def feed(bundle, batch=2):
    states = next(s for s in bundle.graphs["generator"][0].inputs if s.name == "prompt_states").shape[2]
    arrays = {name: value.numpy() for name, value in inputs(batch).items()}
    for name in ("prompt_states", "negative_states"):
        arrays[name] = np.random.RandomState(0).standard_normal((*arrays[name].shape[:2], states)).astype(np.float32)
    return {spec.name: arrays[spec.name] for spec in bundle.graphs["generator"][0].inputs}


def test_scale_zero_equals_positive_only_bit_for_bit(bundles):
    arrays = feed(bundles["nasa"])
    arrays["negative_scale"] = np.zeros(2, np.float32)
    guided = generator_of(bundles["nasa"])(**arrays)["latent"]
    plain = generator_of(bundles["none"])(**{k: v for k, v in arrays.items() if "negative" not in k})["latent"]
    assert np.array_equal(guided, plain)


def test_the_negative_acts_where_its_scale_is_not_zero(bundles):
    arrays = feed(bundles["nasa"])
    off = generator_of(bundles["nasa"])(**{**arrays, "negative_scale": np.zeros(2, np.float32)})["latent"]
    on = generator_of(bundles["nasa"])(**{**arrays, "negative_scale": np.array([0.0, 1.0], np.float32)})["latent"]
    assert np.array_equal(on[0], off[0])
    assert np.abs(on[1] - off[1]).max() > 1e-4


def test_a_batch_does_not_change_an_image(bundles):
    arrays = feed(bundles["nasa"])
    together = generator_of(bundles["nasa"])(**arrays)["latent"]
    alone = generator_of(bundles["nasa"])(**{k: v[1:] for k, v in arrays.items()})["latent"]
    np.testing.assert_allclose(alone[0], together[1], atol=1e-5)


def test_the_timestep_is_folded_and_keys_of_both_prompts_are_one_product(bundles):
    blocks = 2  # of the tiny student
    for kind, extra in (("nasa", 2), ("none", 0)):
        counts = node_counts(bundles[kind].folder / "generator-fp16.onnx")
        assert not {"Sin", "Cos", "Sigmoid"} & counts.keys()  # no timestep embedding is left
        assert counts["LayerNormalization"] == 2 * blocks + 1
        # query, key, value and out of both attentions, widen, narrow, and two products an attention; then the last projection
        assert counts["MatMul"] == blocks * (10 + 4 + extra) + 1


def test_the_bundle_says_its_measured_parity(bundles):
    for graph, variants in bundles["nasa"].graphs.items():
        for variant in variants:
            assert 0 <= variant.parity.relative_l2 < (1e-2 if "tensorrt" in variant.engines else 1e-3)
            assert (variant.parity.latent_error is None) == (graph == "decoder")
            assert variant.parity.psnr is not None and variant.parity.psnr > 40
            assert 0 <= variant.parity.error <= variant.tolerance
    assert bundles["nasa"].graphs["generator"][0].parity.error > 0


def measured(bundles, change):
    """The generator's parity where PyTorch had answered `change(latent)`."""
    arrays = feed(bundles["nasa"])
    path = bundles["nasa"].folder / "generator-fp16.onnx"
    reference = change(load_engine("cpu", path)(**arrays)["latent"])
    comparison = parity.LatentComparison(lambda i, outputs: outputs["latent"], [reference], lambda latent: latent)
    return parity.measure("generator", path, "fp16", ["cpu"], [arrays], [{"latent": reference}], comparison).parity


def test_the_latent_error_is_the_change_of_the_clean_latent(bundles):
    assert measured(bundles, lambda latent: latent).error == 0
    assert measured(bundles, lambda latent: latent + 0.25).error == pytest.approx(0.25, rel=1e-4)
    assert measured(bundles, lambda latent: latent * 1.5).relative_l2 == pytest.approx(1 / 3, rel=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_refused(bundles, tmp_path, value):
    arrays = feed(bundles["nasa"])
    arrays["noise"][0, 0, 0, 0] = value
    path = bundles["nasa"].folder / "generator-fp16.onnx"
    with pytest.raises(OutputError, match="gives NaN or infinity"):
        parity.measure("generator", path, "fp16", ["cpu"], [arrays], [{"latent": np.zeros((2, 8, 16, 16), np.float32)}])


def test_a_variant_beyond_the_tolerance_stops_the_export_and_leaves_nothing(tiny_student, tmp_path):
    with pytest.raises(OutputError, match=r"graph text_encoder in fp16 is .* off PyTorch on cpu, openvino, allowed is 1e-09"):
        write(find_source("small", str(tiny_student)), tmp_path / "bundle", ExportOptions(tolerance=1e-9))
    assert not list(tmp_path.iterdir())


def test_force_replaces_a_bundle_but_never_another_folder(bundles, tiny_student, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="exists"):
        export(tiny_student, tmp_path / "mine", "small", force=True)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_every_installed_engine_agrees(bundles):
    arrays = feed(bundles["nasa"])
    answers = [generator_of(bundles["nasa"], name)(**arrays)["latent"] for name in installed() if name in ("cpu", "openvino")]
    for answer in answers[1:]:
        np.testing.assert_allclose(answer, answers[0], atol=5e-4)


def test_no_path_of_this_machine_is_in_a_graph(bundles):
    for file in bundles["nasa"].folder.glob("*.onnx"):
        content = file.read_bytes()
        assert str(Path.home()).encode() not in content and b"site-packages" not in content and b".py" not in content


def test_an_existing_folder_is_kept_without_force(bundles, tiny_student):
    with pytest.raises(InputError, match="exists: choose another folder, or --force to replace it if it is a bundle"):
        export(tiny_student, bundles["nasa"].folder, "small")


def test_an_unknown_backbone_lists_the_known_ones(tiny_student, tmp_path):
    with pytest.raises(InputError, match="unknown backbone 'large', choose from small, pixart"):
        export(tiny_student, tmp_path / "bundle", "large")


def test_weights_without_a_part_are_one_clear_line(tiny_student, tmp_path):
    shutil.copytree(tiny_student / "vae", tmp_path / "half" / "vae")
    with pytest.raises(InputError, match="half has no transformer: it is not a model of backbone small"):
        export(tmp_path / "half", tmp_path / "bundle", "small")


def test_a_killed_export_leaves_no_bundle_and_the_next_one_succeeds(tiny_student, tmp_path):
    out = tmp_path / "bundle"
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from snoopi_rt.export import exporter, source\nfrom snoopi_rt.export.onnx_graphs import variants\n"
        "from snoopi_rt.export.options import ExportOptions\n"
        f"options = ExportOptions(**{WITHOUT_TEXT_ENCODER})\n"
        "measure = variants.measure\n"
        "def killed(graph, *rest):\n"
        "    if graph == 'generator': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return measure(graph, *rest)\n"
        "variants.measure = killed\n"
        "exporter.export(source.find_source('small', sys.argv[1]), Path(sys.argv[2]), options)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_student), str(out)], check=False, capture_output=True, cwd=tmp_path, env=os.environ
    )
    assert done.returncode == -signal.SIGKILL
    assert not out.exists() and not list(tmp_path.rglob("bundle.json"))
    assert export(tiny_student, out, "small", **WITHOUT_TEXT_ENCODER).folder == out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle"]


def test_two_exports_at_once_do_not_share_a_folder(tiny_student, tmp_path):
    def second(line: str) -> None:
        with pytest.raises(OutputError, match=r"^another process is exporting into .*bundle$"):
            export(tiny_student, tmp_path / "bundle", "small")
        raise KeyboardInterrupt(line)

    (tmp_path / ".bundle.part" / "left").mkdir(parents=True)
    options = ExportOptions(**WITHOUT_TEXT_ENCODER)
    with pytest.raises(KeyboardInterrupt, match="encoding"):
        write(find_source("small", str(tiny_student)), tmp_path / "bundle", options, second)
    assert not list(tmp_path.iterdir())
