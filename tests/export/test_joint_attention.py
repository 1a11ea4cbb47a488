"""`with_negative` on pipelines with joint attention (SD3, FLUX, FLUX.2, Z-Image), against attention over the whole sequence by masks."""

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
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImageImg2ImgPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from snoopi_rt.diffusers import with_negative, without_negative
from snoopi_rt.errors import InputError
from snoopi_rt.export.pipelines import joint_attention
from snoopi_rt.kernels import attention

FAMILIES = ("sd3", "flux", "flux2", "z_image")
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


def _z_image() -> DiffusionPipeline:
    network = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 6, 6],
        axes_lens=[160, 8, 8],
    )  # fmt: skip
    letters = Tokenizer(models.WordLevel({chr(code): code - 32 for code in range(32, 127)}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    template = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="~", chat_template=template)
    text = {"vocab_size": 96, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 512}
    encoder = Qwen3Model(Qwen3Config(**text, num_attention_heads=2, num_key_value_heads=1, head_dim=8, pad_token_id=94)).eval()
    torch.nn.init.normal_(encoder.embed_tokens.weight)
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(), AutoencoderKL(**VAE), encoder, tokenizer, network)


@pytest.fixture
def opened() -> Callable[[str], DiffusionPipeline]:
    def open_pipeline(family: str) -> DiffusionPipeline:
        torch.manual_seed(0)
        pipe = {"sd3": _sd3, "flux": _flux, "flux2": _flux2, "z_image": _z_image}[family]()
        for name, weight in pipe.transformer.named_parameters():
            if any(part in name for part in ("norm", "pos", "proj_out", "mod", "pad_token")):  # nearly nothing at first
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
    calls: list[Any] = []
    pipe.transformer.register_forward_hook(lambda *_: calls.append(None))
    got = drawn(pipe, **asked)
    assert len(calls) == 2  # one per step
    monkeypatch.setattr(joint_attention.JointProcessor, "_apart", by_masks)
    np.testing.assert_allclose(got, drawn(pipe, **asked), atol=2e-5)


def by_masks(processor: Any, query: Tensor, key: Tensor, value: Tensor, texts: list[int], scale: Tensor) -> Tensor:
    """The forms of the papers, each token's row of one softmax over all tokens written out."""
    prompt, negative = texts
    pixels = query.shape[2] - prompt - negative
    order = ["p"] * prompt + ["n"] * negative
    order = order + ["i"] * pixels if processor._text_first else ["i"] * pixels + order
    kinds = np.array(order)

    def softmax(sees: dict[str, str], bias: float = 0.0) -> Tensor:
        """Weights where a token of a kind sees those of the kinds in its string."""
        allowed = torch.tensor([[other in sees[one] for other in order] for one in order])
        scores = (query.double() @ key.double().transpose(-1, -2)) / query.shape[-1] ** 0.5
        scores = scores + torch.from_numpy((kinds == "n") * bias)
        return scores.masked_fill(~allowed, -torch.inf).softmax(-1)

    apart_from_each_other = {"p": "pi", "n": "ni"}
    v, scale = value.double(), scale[:, None, None, None]
    signs = torch.from_numpy(kinds == "n")[:, None]
    positive, unwanted = (softmax({**apart_from_each_other, "i": sees}) @ v for sees in ("pi", "ni"))
    match processor._call.guidance.kind:
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
    rows = [("a red cat on the mat of an old house", "blue fog", 0.9), ("a blue dog", "the moon", 0.3), ("a dog", None, 1.0)]
    prompts, negatives, scales = map(list, zip(*rows, strict=True))
    latents = torch.randn(3, *{"sd3": (4, 8, 8), "flux": (16, 16), "flux2": (16, 4, 4), "z_image": (4, 8, 8)}[family])
    asked = {"negative_prompt": negatives, "negative_scale": scales}
    images = drawn(pipe, [*prompts], **asked, latents=latents)  # ZImagePipeline writes into the list
    for i, (prompt, negative, scale) in enumerate(rows):
        guided = {"negative_prompt": negative, "negative_scale": scale} if negative else {}
        np.testing.assert_allclose(images[i], drawn(pipe, prompt, **guided, latents=latents[i : i + 1])[0], atol=1e-4)
    twice = drawn(pipe, prompts, **asked, latents=latents.repeat_interleave(2, 0), num_images_per_prompt=2)
    np.testing.assert_allclose(twice, images.repeat(2, 0), atol=1e-4)


@pytest.mark.parametrize("texts", [("fog", "a red cat on the mat of an old house"), ("a red cat on the mat of an old house", "fog")])
def test_in_z_image_a_negative_is_to_the_image_what_it_would_be_as_the_prompt(
    opened: Any, texts: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, negative = texts  # one of 32 tokens with its padding, the other of 64
    pipe = opened("z_image")
    # At a width of 128 the image has tokens enough; at 64 it is padded, and its padding is as far from it as the prompt has it.
    for heard, width in ((0, 64), (0, 128), (1, 128)):
        picture = drawn(without_negative(pipe), texts[heard], width=width)

        def listen(prompt: Any, negative: Any, image: Any, scale: Tensor, heard: int = heard) -> Tensor:
            text = (prompt, negative)[heard]
            return attention(image[0], torch.cat([text[1], image[1]], 2), torch.cat([text[2], image[2]], 2))

        monkeypatch.setitem(joint_attention.GUIDANCE, "nasa", joint_attention.JointGuidance("nasa", listen, 1.0))
        np.testing.assert_allclose(drawn(with_negative(pipe), prompt, negative_prompt=negative, width=width), picture, atol=1e-5)


def test_pipelines_of_one_z_image_network_do_not_touch_each_other(opened: Any) -> None:
    pipe = opened("z_image")
    before, asked = drawn(pipe), {"negative_prompt": "blue fog", "negative_scale": 0.7}
    guided = drawn(with_negative(pipe, "gated"), **asked)
    other = with_negative(ZImageImg2ImgPipeline(**pipe.components), "vsf")
    other.set_progress_bar_config(disable=True)
    start = {"image": torch.zeros(1, 3, 64, 64), "strength": 1.0}
    assert not np.allclose(drawn(other, **start, **asked), drawn(other, **start), atol=1e-3)
    np.testing.assert_array_equal(drawn(pipe, **asked), guided)
    without_negative(other)
    np.testing.assert_array_equal(drawn(pipe, **asked), guided)
    np.testing.assert_array_equal(drawn(without_negative(pipe)), before)
    assert "patchify_and_embed" not in vars(pipe.transformer)


@pytest.mark.parametrize("family", ["flux", "z_image"])
def test_it_is_compiled_like_any_other(opened: Any, family: str) -> None:
    pipe = with_negative(opened(family), "gated")
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
    pipe = with_negative(opened("z_image"))
    with pytest.raises(InputError, match="guidance_scale runs each step twice"):
        drawn(pipe, negative_prompt="fog", guidance_scale=1.5)
    states = pipe.encode_prompt("a red cat", do_classifier_free_guidance=False)[0]
    with pytest.raises(InputError, match="a negative prompt needs the prompt as text"):
        drawn(pipe, None, prompt_embeds=states, negative_prompt="fog")
    np.testing.assert_array_equal(drawn(pipe, None, prompt_embeds=states), drawn(pipe))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("controlnet", "ZImagePipeline has a ControlNet"),
        ("siglip", "ZImagePipeline splits its prompts around images"),
        ("transformer", "ZImagePipeline has no text attention"),
    ],
)
def test_pipelines_that_read_the_text_in_another_way_are_refused(opened: Any, part: str, message: str) -> None:
    pipe = opened("z_image")
    other = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=1, joint_attention_dim=8,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    setattr(pipe, part, other)
    with pytest.raises(InputError, match=message):
        with_negative(pipe)


def test_the_attention_backend_can_be_set_afterwards(opened: Any) -> None:
    pipe = with_negative(opened("z_image"))
    try:
        pipe.transformer.set_attention_backend("_native_math")
        assert all(block.attention.processor.plain._attention_backend == "_native_math" for block in pipe.transformer.layers)
        drawn(pipe, negative_prompt="fog")
    finally:
        pipe.transformer.set_attention_backend("native")  # for the whole process
