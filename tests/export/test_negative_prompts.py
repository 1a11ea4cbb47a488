"""`with_negative`: diffusers' own pipelines with a negative prompt, against the formulas written from the papers, and left as they were."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_students
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from paper_attention import CONSTANTS, KINDS, PaperAttention

from snoopi_rt.diffusers import with_negative, without_negative
from snoopi_rt.errors import InputError
from snoopi_rt.export.guidance import GUIDANCE
from snoopi_rt.export.pipelines import negative_prompts

FAMILIES = ("sd15", "sdxl", "pixart", "sana")
ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "latent"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {
        "sd15": tiny_students.stable_diffusion(root / "sd15", "sd15", tiny_vae=True),
        "sdxl": tiny_students.stable_diffusion(root / "sdxl", "sdxl", tiny_vae=True),
        "pixart": tiny_students.pixart(root / "pixart", tiny_vae=True),
        "sana": tiny_students.sana_sprint(root / "sana"),
    }


@pytest.fixture
def opened(folders: dict[str, Path]) -> Any:
    def open_pipeline(family: str) -> DiffusionPipeline:
        pipe = DiffusionPipeline.from_pretrained(folders[family])
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return open_pipeline


def drawn(pipe: DiffusionPipeline, prompt: Any = "a red cat on a mat", **options: Any) -> np.ndarray:
    settings = {**ONE_STEP, **options}
    if "Sana" in type(pipe).__name__:
        settings = {
            "height": 64,
            "width": 64,
            "use_resolution_binning": False,
            "complex_human_instruction": None,
            "intermediate_timesteps": None,
        } | settings
    if "PixArt" in type(pipe).__name__:
        settings = {"use_resolution_binning": False, **settings}
    with torch.no_grad():
        return pipe(prompt, generator=torch.Generator().manual_seed(3), **settings).images.numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_negative_it_is_the_untouched_pipeline_bit_for_bit(opened: Any, family: str) -> None:
    pipe = opened(family)
    before, kind = drawn(pipe), type(pipe)
    assert with_negative(pipe) is pipe and type(pipe).__name__ == kind.__name__ and isinstance(pipe, kind)
    for options in ({}, {"negative_prompt": " "}, {"negative_prompt": "blurry", "negative_scale": 0.0}):
        np.testing.assert_array_equal(drawn(pipe, **options), before)
    assert not np.allclose(drawn(pipe, negative_prompt="blurry fog", negative_scale=1.0), before, atol=1e-4)
    np.testing.assert_array_equal(drawn(pipe), before)  # nothing is left of the call before
    assert without_negative(pipe) is pipe and type(pipe) is kind
    np.testing.assert_array_equal(drawn(pipe), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_formula_of_the_paper(opened: Any, family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CONSTANTS.items():
        if name in GUIDANCE[kind].fixed:
            assert GUIDANCE[kind].fixed[name] == value
    pipe = with_negative(opened(family), kind)
    got = drawn(pipe, negative_prompt="blue fog", negative_scale=0.7)
    monkeypatch.setattr(negative_prompts._NegativeProcessor, "__call__", paper)
    np.testing.assert_allclose(got, drawn(pipe, negative_prompt="blue fog", negative_scale=0.7), atol=2e-5)


def paper(
    processor: Any, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None, **_: object
) -> torch.Tensor:
    """What stands behind the prompt's states, by PaperAttention."""
    call = processor._call
    mask, parts = attention_mask, encoder_hidden_states.split(call.lengths, 1)
    keep = (
        [torch.ones(part.shape[:2], dtype=torch.bool) for part in parts]
        if mask is None
        else [m[:, 0] > -1 for m in mask.split(call.lengths, 2)]
    )
    empty = parts[2][:1, keep[2][0]] if len(parts) > 2 else parts[0][:1]
    formula = PaperAttention(call.guidance.kind, parts[1], call.scale, empty, keep[1], across_heads=attn.norm_q is not None)
    return formula(attn, hidden_states, parts[0], None if mask is None else mask[:, :, : call.lengths[0]])


@pytest.mark.parametrize("family", ["sd15", "pixart"])
def test_every_prompt_of_a_batch_has_its_own_negative_and_scale(opened: Any, family: str) -> None:
    pipe = with_negative(opened(family))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = [("a red cat", "blue fog", 0.9), ("a blue dog", "the moon", 0.3)]
    both = drawn(
        pipe, [row[0] for row in rows], negative_prompt=[row[1] for row in rows], negative_scale=[row[2] for row in rows], latents=noise
    )
    for i, (prompt, negative, scale) in enumerate(rows):
        alone = drawn(pipe, prompt, negative_prompt=negative, negative_scale=scale, latents=noise[i : i + 1])
        np.testing.assert_allclose(both[i], alone[0], atol=1e-5)
    blank = drawn(pipe, [row[0] for row in rows], negative_prompt=["blue fog", None], negative_scale=0.9, latents=noise)
    np.testing.assert_allclose(blank[0], both[0], atol=1e-5)
    np.testing.assert_allclose(blank[1], drawn(pipe, "a blue dog", latents=noise[1:])[0], atol=1e-5)
    two = drawn(pipe, "a red cat", negative_prompt="blue fog", negative_scale=0.9, latents=noise, num_images_per_prompt=2)
    np.testing.assert_allclose(two[0], both[0], atol=1e-5)


def test_two_pipelines_do_not_touch_each_other(opened: Any) -> None:
    plain, one, other = (opened("sd15") for _ in range(3))
    before = drawn(plain)
    with_negative(one, "nasa")
    with_negative(other, "vsf")
    asked = {"negative_prompt": "blue fog", "negative_scale": 0.7}
    first = drawn(one, **asked)
    assert not np.allclose(first, drawn(other, **asked), atol=1e-4)
    np.testing.assert_array_equal(drawn(one, **asked), first)
    np.testing.assert_array_equal(drawn(plain), before)
    np.testing.assert_array_equal(drawn(with_negative(other, "nasa"), **asked), first)  # the last kind counts


def test_states_that_were_encoded_before_have_negatives_too(opened: Any) -> None:
    pipe = with_negative(opened("sd15"))
    states = pipe.encode_prompt("a red cat on a mat", "cpu", 1, False)[0]
    asked = {"negative_prompt": "blue fog", "negative_scale": 0.7}
    np.testing.assert_array_equal(drawn(pipe, None, prompt_embeds=states, **asked), drawn(pipe, **asked))


def test_it_is_compiled_and_saved_like_any_other(opened: Any, tmp_path: Path) -> None:
    pipe = with_negative(opened("pixart"))
    asked = {"negative_prompt": "blue fog", "negative_scale": 0.7}
    plain, guided = drawn(pipe), drawn(pipe, **asked)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    np.testing.assert_allclose(drawn(pipe, **asked), guided, atol=1e-5)
    np.testing.assert_allclose(drawn(pipe), plain, atol=1e-5)
    opened_again = with_negative(opened("sd15"))
    opened_again.save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)).__name__ == "StableDiffusionPipeline"


def test_loras_offloading_and_callbacks_stay(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate, peft = pytest.importorskip("accelerate"), pytest.importorskip("peft")
    asked = {"negative_prompt": "blue fog", "negative_scale": 0.7}
    pipe = with_negative(opened("sd15"))
    plain = drawn(pipe, **asked)
    seen = []

    def callback(pipe: DiffusionPipeline, step: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["prompt_embeds"].shape[1])
        return tensors

    called = drawn(pipe, **asked, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    np.testing.assert_array_equal(called, plain)
    assert seen == [2 * pipe.tokenizer.model_max_length]
    torch.manual_seed(1)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    adapted = drawn(pipe, **asked)
    assert not np.allclose(adapted, plain, atol=1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(negative_prompts._NegativeProcessor, "__call__", paper)
        np.testing.assert_allclose(adapted, drawn(pipe, **asked), atol=2e-5)
    accelerate.cpu_offload(pipe.unet, execution_device="cpu")
    assert next(pipe.unet.parameters()).is_meta
    np.testing.assert_allclose(drawn(pipe, **asked), adapted, atol=1e-6)


def test_processors_that_were_set_since_and_other_forms_of_a_pipeline(opened: Any) -> None:
    asked = {"negative_prompt": "blue fog", "negative_scale": 0.7}
    pipe = with_negative(opened("sdxl"))
    guided = drawn(pipe, **asked)
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(InputError, match="call it again"):
        drawn(pipe, **asked)
    np.testing.assert_allclose(drawn(with_negative(pipe), **asked), guided, atol=1e-5)
    from_image = StableDiffusionImg2ImgPipeline(**opened("sd15").components, requires_safety_checker=False)
    options = {"image": torch.zeros(1, 3, 64, 64), "strength": 1.0}
    before = drawn(from_image, **options)
    with_negative(from_image)
    np.testing.assert_array_equal(drawn(from_image, **options), before)
    assert not np.allclose(drawn(from_image, **options, **asked), before, atol=1e-4)


def test_an_ip_adapter_is_refused(opened: Any) -> None:
    pipe = opened("sd15")
    attn = next(module for name, module in pipe.unet.named_modules() if name.endswith("attn2"))
    attn.set_processor(type("IPAdapterAttnProcessor2_0", (AttnProcessor2_0,), {})())
    with pytest.raises(InputError, match="an IP-Adapter"):
        with_negative(pipe)


@pytest.fixture
def asking(opened: Any) -> Iterator[DiffusionPipeline]:
    pipe = with_negative(opened("sd15"))
    before = drawn(pipe)
    yield pipe
    np.testing.assert_array_equal(drawn(pipe), before)  # an error leaves nothing behind


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"guidance_scale": 7.5}, "guidance_scale runs each step twice"),
        ({"negative_prompt": ["fog", "moon"]}, "negative_prompt has 2 entries for 1 prompts"),
        ({"negative_prompt": [None, ""], "negative_scale": 1.0}, "negative_scale without a negative_prompt: give both, or neither"),
        ({"negative_scale": -0.1}, "negative_scale must be a finite number of at least 0, got -0.1"),
        ({"negative_scale": float("nan")}, "negative_scale must be a finite number of at least 0, got nan"),
        ({"negative_scale": [0.1, 0.2, 0.3]}, "negative_scale has 3 entries for 1 prompts"),
    ],
)
def test_what_cannot_be_asked_is_one_clear_line(asking: DiffusionPipeline, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        drawn(asking, **{"negative_prompt": "fog", **asked})


def test_what_cannot_have_a_negative_says_so(opened: Any) -> None:
    with pytest.raises(InputError, match="unknown kind 'cfg' of StableDiffusionPipeline, choose from nasa, nag, vsf, projected"):
        with_negative(opened("sd15"), "cfg")
    pipe = opened("sd15")
    pipe.unet = torch.nn.Identity()
    with pytest.raises(InputError, match="StableDiffusionPipeline has no text attention"):
        with_negative(pipe)
    pipe = with_negative(opened("sd15"))
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    with pytest.raises(InputError, match="call it again"):
        drawn(pipe, negative_prompt="fog")
