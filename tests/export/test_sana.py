"""SANA-Sprint: its rule is diffusers' scheduler, its folded network and its bundles are diffusers' pipeline, its prompts Gemma's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_students
import torch
from diffusers import SanaSprintPipeline, SCMScheduler
from diffusers.schedulers import scheduling_scm
from onnx_nodes import node_counts
from paper_attention import CONSTANTS, KINDS, SCALES, PaperAttention
from torch import Tensor

import snoopi_rt
from snoopi_rt.bundle.bundle import GRAPHS, Bundle, Instruction
from snoopi_rt.bundle.tokenizer import Tokenizer
from snoopi_rt.engines import load_engine
from snoopi_rt.errors import InputError
from snoopi_rt.export.backbones.sana import FoldedSana, GuidedSana
from snoopi_rt.export.exporter import export
from snoopi_rt.export.guidance import GUIDANCE
from snoopi_rt.export.one_step import trigflow_rule
from snoopi_rt.export.options import ExportOptions
from snoopi_rt.export.presets.choose import find_preset
from snoopi_rt.export.source import find_source
from snoopi_rt.export.text.gemma import InstructedGemma, instruction
from snoopi_rt.export.text.rule import gemma_rule, gemma_tokenizer
from snoopi_rt.runtime.inputs import draw_noise

PROMPT, NEGATIVE = "A red cat on a mat, it's naive ", "a blue dog in the fog"
FP32 = {graph: ["fp32"] for graph in GRAPHS}
STEPS = {1: (1.5708,), 2: (1.5708, 1.3), 4: (1.5708, 1.1781, 0.7854, 0.3927)}


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_students.sana_sprint(tmp_path_factory.mktemp("sana") / "student")


@pytest.fixture
def pipe(student: Path) -> SanaSprintPipeline:
    opened = SanaSprintPipeline.from_pretrained(student)
    opened.set_progress_bar_config(disable=True)
    return opened


def drawn(pipe: SanaSprintPipeline, noise: Tensor, renoise: Tensor, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """What the pipeline draws of noise (B, C, h, w) in as many steps as renoise (B, S - 1, C, h, w) is for."""
    steps = renoise.shape[1] + 1
    fresh = iter([*renoise.unbind(1), torch.zeros_like(noise)])  # the scheduler draws some after the last step too
    monkeypatch.setattr(scheduling_scm, "randn_tensor", lambda *_, **__: next(fresh))
    size = {"height": 32 * noise.shape[2], "width": 32 * noise.shape[3], "use_resolution_binning": False}
    call = {"num_inference_steps": steps, "intermediate_timesteps": 1.3 if steps == 2 else None, "latents": noise}
    return pipe(PROMPT, **size, **call, **options).images


@pytest.mark.parametrize("steps", STEPS)
def test_steps_are_those_of_the_pipeline_and_its_scheduler(steps: int) -> None:
    random = torch.Generator().manual_seed(0)
    noise, renoise = torch.randn(2, 8, 4, 4, generator=random), torch.randn(2, steps - 1, 8, 4, 4, generator=random)
    scheduler = SCMScheduler()
    scheduler.set_timesteps(steps, intermediate_timesteps=1.3 if steps == 2 else None)
    assert scheduler.timesteps[:-1].tolist() == pytest.approx(STEPS[steps], abs=1e-4)

    def toy(x: Tensor, t: float) -> Tensor:
        return torch.sin(x + 0.3 * x.roll(1, -1) + t)

    # The pipeline's own arithmetic, word for word.
    fresh, latents = iter([*renoise.unbind(1), noise]), noise * scheduler.config.sigma_data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduling_scm, "randn_tensor", lambda *_, **__: next(fresh))
        for t in scheduler.timesteps[:-1]:
            s = torch.sin(t) / (torch.cos(t) + torch.sin(t))
            x = latents / scheduler.config.sigma_data * torch.sqrt(s**2 + (1 - s) ** 2)
            prediction = ((1 - 2 * s) * x + (1 - 2 * s + 2 * s**2) * toy(x, float(s))) / torch.sqrt(s**2 + (1 - s) ** 2)
            latents, clean = scheduler.step(prediction * scheduler.config.sigma_data, t, latents, return_dict=False)
    rule = trigflow_rule(scheduler.timesteps[:-1].tolist())
    ours = rule.run(lambda i, x_t: toy(x_t, rule.steps[i].timestep), noise, renoise)
    torch.testing.assert_close(ours, clean / scheduler.config.sigma_data, atol=2e-5, rtol=1e-5)


def test_rows_are_diffusers_defaults() -> None:
    one, two = (find_preset(name).rule for name in ("sana-sprint-0.6b", "sana-sprint-1.6b-2step"))
    assert (one.timestep, one.input_scale, one.later) == (pytest.approx(1, abs=1e-5), pytest.approx(1, abs=1e-5), ())
    assert (two.later[0].timestep, two.later[0].alpha) == (pytest.approx(0.782708, abs=1e-6), pytest.approx(0.217292, abs=1e-6))


@pytest.mark.parametrize("kind", KINDS)
def test_the_folded_network_is_diffusers_own_with_the_papers_formula_in_every_layer(pipe: SanaSprintPipeline, kind: str) -> None:
    network, random = pipe.transformer, torch.Generator().manual_seed(1)
    network.caption_projection = network.caption_norm = torch.nn.Identity()

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    batch = len(SCALES)
    empty, states, negative = draw(1, 2, 24), draw(batch, 5, 24), draw(batch, 3, 24)
    inputs = {"noise": draw(batch, 8, 2, 3), "prompt_states": states, "negative_states": negative}
    inputs |= {"negative_scale": torch.tensor(SCALES), "renoise": draw(batch, 1, 8, 2, 3)}
    rule = trigflow_rule(STEPS[2])
    for name, value in CONSTANTS.items():
        assert GUIDANCE[kind].fixed.get(name, value) == value
    with torch.no_grad():
        folded = FoldedSana(network, rule, GUIDANCE[kind], empty, 4.5)(**inputs)
        reference = GuidedSana(network, rule, GUIDANCE[kind], empty, 4.5)(**inputs)
        other = FoldedSana(network, rule, GUIDANCE[kind], empty, 5.0)(**inputs)
        for block in network.transformer_blocks:
            block.attn2.set_processor(PaperAttention(kind, negative, inputs["negative_scale"], empty, across_heads=True))

        def predict(step: int, x: Tensor) -> Tensor:
            fed = torch.full((batch,), rule.steps[step].timestep), torch.full((batch,), 0.45)
            return network(x, states, *fed, return_dict=False)[0]

        paper = rule.run(predict, inputs["noise"], inputs["renoise"])
    torch.testing.assert_close(folded, reference, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(folded, paper, atol=2e-5, rtol=1e-4)
    assert paper.std() > 0.1 and (other - folded).abs().max() > 1e-4


# ---- Gemma


def test_ids_and_states_are_what_the_pipeline_keeps(pipe: SanaSprintPipeline, student: Path, tmp_path: Path) -> None:
    rule = gemma_rule(student / "tokenizer", tmp_path / "tokenizer.json", 300, 10**6, instruction())
    assert rule.instruction is not None and (rule.max_tokens, rule.lowercase, rule.pad) == (300, True, None)
    tokenizer = Tokenizer(tmp_path / "tokenizer.json", rule.max_tokens, rule.lowercase, instruction=rule.instruction)
    told = gemma_tokenizer(student / "tokenizer")(instruction()).input_ids
    gemma = InstructedGemma(student / "text_encoder", told[:-1], 300)
    prompts = ["", PROMPT, "Cats \N{CAT} and dogs, " * 3, "the moon " * 200]
    ids = [torch.from_numpy(tokenizer(prompt, truncate=True)) for prompt in prompts]
    for prompt, own, states in zip(prompts, ids, gemma.states(ids), strict=True):
        with torch.no_grad():
            padded, mask = pipe.encode_prompt(prompt, 1, "cpu", complex_human_instruction=instruction().split("\n"))
        assert own.shape[1] == int(mask.sum()) <= 300
        torch.testing.assert_close(states, padded[:, mask[0].bool()], atol=2e-5, rtol=1e-5)
    assert ids[-1].shape[1] == 300 and ids[0][0, 0] == told[0] and ids[0].shape[1] == 2
    with pytest.raises(InputError, match=r"prompt has \d+ tokens, the limit is 300"):
        tokenizer(prompts[-1])


def test_an_instruction_that_a_prompt_changes_is_refused(original: Bundle) -> None:
    path = original.folder / "tokenizer.json"
    tokenizer = Tokenizer(path, 6, lowercase=True, instruction=Instruction("a red ", 3))
    assert tokenizer("cat").tolist() == [[0, 7, 1]]
    glued = Tokenizer(path, 6, lowercase=True, instruction=Instruction("a red", 3))
    with pytest.raises(InputError, match="prompt 'cat' cannot be distinguished from the instruction before it"):
        glued("cat")


def test_a_gemma_that_sees_too_little_is_one_clear_line(student: Path) -> None:
    with pytest.raises(InputError, match="sees 4096 tokens, the instruction has 4000 and a prompt up to 300"):
        InstructedGemma(student / "text_encoder", range(4000), 300)


# ---- bundles


@pytest.fixture(scope="module", params=[1, 2])
def bundle(request: pytest.FixtureRequest, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """In two sizes and one step, and of one size in two steps with the states of its prompts alone."""
    out = tmp_path_factory.mktemp("bundles") / str(request.param)
    if request.param == 1:
        options = ExportOptions(precision=FP32, sizes=((64, 64), (64, 96)))
    else:
        options = ExportOptions(precision=FP32, sizes=((64, 64),), prompts=(PROMPT, NEGATIVE), prompts_only=True)
    suffix = "" if request.param == 1 else "-2step"
    return export(find_source(preset=f"sana-sprint-0.6b{suffix}", weights=str(student)), out, options)


def test_a_bundle_draws_what_the_pipeline_draws_and_its_negative_is_the_formula(
    bundle: Bundle, pipe: SanaSprintPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 1 if "text_encoder" in bundle.graphs else 2
    size = bundle.sizes[-1]
    latent = (8, size[0] // 32, size[1] // 32)
    noise, renoise = (torch.from_numpy(array)[None] for array in draw_noise(5, latent, steps - 1))
    with torch.no_grad():
        padded, mask = pipe.encode_prompt(NEGATIVE, 1, "cpu", complex_human_instruction=instruction().split("\n"))
        negative = pipe.transformer.caption_norm(pipe.transformer.caption_projection(padded[:, mask[0].bool()]))
    generator = load_engine("cpu", bundle.folder / "generator-fp32.onnx")
    with snoopi_rt.load(bundle, engine="cpu") as ours:
        states = {name: ours.prepare(text).states["states"] for name, text in (("prompt", PROMPT), ("negative", NEGATIVE))}
        for scale in (0.0, 0.7):
            if scale:
                processor = PaperAttention("nasa", negative, torch.tensor([scale]), negative[:, :1], across_heads=True)
                for block in pipe.transformer.transformer_blocks:
                    block.attn2.set_processor(processor)
            theirs = drawn(pipe, noise, renoise, monkeypatch, output_type="latent")
            given = {"noise": noise, "renoise": renoise, "negative_scale": torch.tensor([scale])}
            arrays = {name: value.numpy() for name, value in given.items()}
            arrays |= {f"{name}_states": value for name, value in states.items()}
            found = generator(**{spec.name: arrays[spec.name] for spec in generator.inputs})["latent"]
            assert np.abs(found - theirs.numpy()).max() < 1e-4
            image = ours.generate(PROMPT, NEGATIVE if scale else None, scale or None, seed=5, size=size).images.astype(np.float64)
            picture = 255 * drawn(pipe, noise, renoise, monkeypatch, output_type="np")
            assert np.abs(image - picture).max() <= 0.5 + 255 * 1e-3
            assert picture.std() > 4


def test_nothing_of_the_timestep_is_left_in_the_graph(bundle: Bundle) -> None:
    counts = node_counts(bundle.folder / "generator-fp32.onnx")
    steps = 1 if "text_encoder" in bundle.graphs else 2
    assert not {"Sin", "Cos", "Gemm", "Pad"} & counts.keys()
    assert counts["LayerNormalization"] == steps * (2 * 2 + 1)  # of two blocks, and the last
    assert counts["Conv"] == steps * 2 * 2  # the two halves of each block's depthwise one; all others are products
    if steps == 1:
        assert not {"Sin", "Cos"} & node_counts(bundle.folder / "text_encoder-fp32.onnx").keys()


def test_without_guidance_it_exports_and_draws(student: Path, tmp_path: Path) -> None:
    options = ExportOptions("none", FP32, sizes=((64, 64),), prompts=(PROMPT,), prompts_only=True)
    with snoopi_rt.load(export(find_source("sana", str(student)), tmp_path / "bundle", options), engine="cpu") as ours:
        assert ours.generate(PROMPT, seed=1).images.std() > 4


def test_weights_in_few_bits_are_near_enough_and_draw_with_another_guidance(student: Path, tmp_path: Path) -> None:
    precision = {"text_encoder": ["int8-weights"], "generator": ["fp16"], "decoder": ["fp16"]}
    options = ExportOptions("projected", precision, sizes=((64, 64),))
    made = export(find_source("sana", str(student)), tmp_path / "bundle", options)
    assert [variant.precision for variant in made.graphs["text_encoder"]] == ["int8-weights"]
    with snoopi_rt.load(made, engine="cpu") as ours:
        plain = ours.generate(PROMPT, seed=1).images
        assert not np.array_equal(ours.generate(PROMPT, NEGATIVE, 1.0, seed=1).images, plain)
