"""`with_negative` on pipelines with joint attention (SD3, FLUX, FLUX.2), against attention over the whole sequence by masks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_students
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor

from snoopi_rt.diffusers import with_negative, without_negative
from snoopi_rt.errors import InputError
from snoopi_rt.export import joint_attention

FAMILIES = ("sd3", "flux", "flux2")
VAE: dict[str, Any] = {**tiny_students.VAE, "latent_channels": 4, "shift_factor": 0.0}


def states_of(prompt: str | list[str], tokens: int, width: int) -> Tensor:
    """Stands in for a text encoder: the same states for the same text."""
    texts = [prompt] if isinstance(prompt, str) else prompt
    return torch.stack([torch.randn(tokens, width, generator=torch.Generator().manual_seed(sum(text.encode()))) for text in texts])


class _SD3(StableDiffusion3Pipeline):
    def _get_clip_prompt_embeds(self, prompt: Any, num_images_per_prompt: int = 1, **_: Any) -> Any:
        states = states_of(prompt, 5, 8).repeat_interleave(num_images_per_prompt, 0)
        return states, states.mean(1)

    def _get_t5_prompt_embeds(self, prompt: Any, num_images_per_prompt: int = 1, **_: Any) -> Tensor:
        return states_of(prompt, 7, 16).repeat_interleave(num_images_per_prompt, 0)


class _Flux(FluxPipeline):
    def _get_clip_prompt_embeds(self, prompt: Any, num_images_per_prompt: int = 1, **_: Any) -> Tensor:
        return states_of(prompt, 1, 8)[:, 0].repeat_interleave(num_images_per_prompt, 0)

    def _get_t5_prompt_embeds(self, prompt: Any, num_images_per_prompt: int = 1, **_: Any) -> Tensor:
        return states_of(prompt, 6, 16).repeat_interleave(num_images_per_prompt, 0)


class _Flux2(Flux2KleinPipeline):
    @staticmethod
    def _get_qwen3_prompt_embeds(prompt: Any, **_: Any) -> Tensor:
        return states_of(prompt, 6, 16)


def _sd3() -> DiffusionPipeline:
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=16, out_channels=4, pos_embed_max_size=16, qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )  # fmt: skip
    return _SD3(network, FlowMatchEulerDiscreteScheduler(), AutoencoderKL(**VAE), None, None, None, None, None, None)


def _flux() -> DiffusionPipeline:
    network = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, guidance_embeds=False, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return _Flux(FlowMatchEulerDiscreteScheduler(), AutoencoderKL(**VAE), None, None, None, None, network)


def _flux2() -> DiffusionPipeline:
    network = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=8, mlp_ratio=2.0, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    return _Flux2(FlowMatchEulerDiscreteScheduler(), vae, None, None, network, is_distilled=True)


@pytest.fixture
def opened() -> Callable[[str], DiffusionPipeline]:
    def open_pipeline(family: str) -> DiffusionPipeline:
        torch.manual_seed(0)
        pipe = {"sd3": _sd3, "flux": _flux, "flux2": _flux2}[family]()
        for name, weight in pipe.transformer.named_parameters():
            if "norm" in name or "pos" in name or "proj_out" in name or "mod" in name:  # nearly nothing at first
                torch.nn.init.normal_(weight, std=0.3)
        pipe.transformer.eval().requires_grad_(False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return open_pipeline


def drawn(pipe: DiffusionPipeline, prompt: Any = "a red cat", **options: Any) -> np.ndarray:
    settings = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "latent", "height": 64, "width": 64, **options}
    with torch.no_grad():
        return pipe(prompt=prompt, generator=torch.Generator().manual_seed(3), **settings).images.numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_negative_it_is_the_untouched_pipeline_bit_for_bit(opened: Any, family: str) -> None:
    pipe = opened(family)
    before, kind = drawn(pipe), type(pipe)
    assert with_negative(pipe) is pipe and isinstance(pipe, kind)
    for options in ({}, {"negative_prompt": " "}, {"negative_prompt": "fog", "negative_scale": 0.0}):
        np.testing.assert_array_equal(drawn(pipe, **options), before)
    assert not np.allclose(drawn(pipe, negative_prompt="fog", negative_scale=1.0), before, atol=1e-3)
    np.testing.assert_array_equal(drawn(pipe), before)  # nothing is left of the call before
    assert type(without_negative(pipe)) is kind
    np.testing.assert_array_equal(drawn(pipe), before)


@pytest.mark.parametrize("kind", joint_attention.GUIDANCE)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_attention_over_the_whole_sequence_by_masks(opened: Any, family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = with_negative(opened(family), kind)
    asked = {"negative_prompt": ["blue fog"], "negative_scale": 0.7, "num_inference_steps": 2}
    got = drawn(pipe, **asked)
    monkeypatch.setattr(joint_attention._Apart, "_attend", by_masks)
    np.testing.assert_allclose(got, drawn(pipe, **asked), atol=2e-5)


def by_masks(apart: Any, query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
    """The forms of the papers, each token's row of one softmax over all tokens written out."""
    prompt, negative = apart._call.lengths
    pixels = query.shape[2] - prompt - negative
    order = ["p"] * prompt + ["n"] * negative
    order = order + ["i"] * pixels if apart._text_first else ["i"] * pixels + order
    kinds = np.array(order)

    def softmax(sees: dict[str, str], bias: float = 0.0) -> Tensor:
        """Weights where a token of a kind sees those of the kinds in its string."""
        allowed = torch.tensor([[other in sees[one] for other in order] for one in order])
        scores = (query.double() @ key.double().transpose(-1, -2)) / query.shape[-1] ** 0.5
        scores = scores + torch.from_numpy((kinds == "n") * bias)
        return scores.masked_fill(~allowed, -torch.inf).softmax(-1)

    apart_from_each_other = {"p": "pi", "n": "ni"}
    v, scale = value.double(), float(apart._call.scale[0])
    signs = torch.from_numpy(kinds == "n")[:, None]
    positive, unwanted = (softmax({**apart_from_each_other, "i": sees}) @ v for sees in ("pi", "ni"))
    match apart._call.guidance.kind:
        case "nasa":
            image = positive - scale * unwanted
        case "gated":
            image = positive - scale * (softmax({**apart_from_each_other, "i": "ni"}) @ torch.where(signs, v, 0.0))
        case "vsf":
            image = softmax({**apart_from_each_other, "i": "pni"}, bias=-0.1) @ torch.where(signs, -scale * v, v)
        case "nag":
            tilted = positive + scale * (positive - unwanted)
            ratio = tilted.abs().sum((1, 3), keepdim=True) / positive.abs().sum((1, 3), keepdim=True)
            image = 0.25 * tilted * ratio.clamp(max=2.5) / ratio + 0.75 * positive
    pixel = torch.from_numpy(kinds == "i")[:, None]
    return torch.where(pixel, image, torch.where(signs, unwanted, positive)).to(query.dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_negative_reaches_the_prompt_and_the_image_by_its_scale_alone(opened: Any, family: str) -> None:
    pipe = opened(family)
    before = drawn(pipe)
    for kind in ("nasa", "nag", "gated"):
        np.testing.assert_allclose(drawn(with_negative(pipe, kind), negative_prompt="fog", negative_scale=1e-6), before, atol=1e-4)
    # What is not wanted is all that is wanted: nothing is to be taken away by the difference of both.
    np.testing.assert_allclose(drawn(with_negative(pipe, "nag"), negative_prompt="a red cat", negative_scale=4.0), before, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_prompt_of_a_batch_has_its_own_negative_and_scale(opened: Any, family: str) -> None:
    pipe = with_negative(opened(family), "gated")
    rows = [("a red cat", "blue fog", 0.9), ("a blue dog", "the moon", 0.3)]
    both = [row[i] for i in range(3) for row in rows]
    latents = torch.randn(2, *{"sd3": (4, 8, 8), "flux": (16, 16), "flux2": (16, 4, 4)}[family])
    images = drawn(pipe, both[:2], negative_prompt=both[2:4], negative_scale=both[4:], latents=latents)
    for i, (prompt, negative, scale) in enumerate(rows):
        alone = drawn(pipe, prompt, negative_prompt=negative, negative_scale=scale, latents=latents[i : i + 1])
        np.testing.assert_allclose(images[i], alone[0], atol=1e-4)


def test_it_is_compiled_like_any_other(opened: Any) -> None:
    pipe = with_negative(opened("flux"), "gated")
    plain, guided = drawn(pipe), drawn(pipe, negative_prompt="fog")
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    np.testing.assert_allclose(drawn(pipe), plain, atol=1e-5)
    np.testing.assert_allclose(drawn(pipe, negative_prompt="fog"), guided, atol=1e-5)


def test_what_cannot_be_asked_is_one_clear_line(opened: Any) -> None:
    with pytest.raises(InputError, match="unknown kind 'projected' of _Flux, choose from nasa, nag, vsf, gated"):
        with_negative(opened("flux"), "projected")
    pipe = with_negative(opened("sd3"))
    with pytest.raises(InputError, match="guidance_scale runs each step twice"):
        drawn(pipe, negative_prompt="fog", guidance_scale=7.0)
    with pytest.raises(InputError, match="negative_prompt has 2 entries for 1 prompts"):
        drawn(pipe, negative_prompt=["fog", "moon"])
