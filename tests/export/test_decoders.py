"""Decoders give the very levels that diffusers gives, in PyTorch and as graphs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn

from snoopi_rt.engines import load_engine
from snoopi_rt.errors import InputError
from snoopi_rt.export.decoder import Decoder
from snoopi_rt.export.onnx_graphs.write import write_graph


def full(**changes: object) -> AutoencoderKL:
    """AutoencoderKL with one block a level and attention in its middle."""
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4, "scaling_factor": 0.18215}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    torch.manual_seed(0)
    return AutoencoderKL(**{**sizes, **blocks, **changes}).eval().requires_grad_(False)


def tiny(**changes: object) -> AutoencoderTiny:
    """AutoencoderTiny in TAESD's layout."""
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (2, 1)}
    torch.manual_seed(0)
    return AutoencoderTiny(**{**sizes, **blocks, **changes}).eval().requires_grad_(False)


VAES = {
    "full": full,
    "full with a shift and no convolution before": lambda: full(shift_factor=0.3, use_post_quant_conv=False),
    "tiny": tiny,
    "tiny of the small student": lambda: tiny(scaling_factor=0.6, latent_channels=8),
}


def latents(vae: nn.Module, height: int = 12, width: int = 10) -> Tensor:
    """Latents whose image reaches both black and white, so that the clamp has work to do."""
    return 3 * torch.randn(2, vae.config.latent_channels, height, width, generator=torch.Generator().manual_seed(0))


def as_diffusers(vae: nn.Module, latent: Tensor) -> np.ndarray:
    """The end of diffusers' pipelines, to the bytes of the pictures."""
    decoded = vae.decode(latent / vae.config.scaling_factor + (vae.config.shift_factor or 0), return_dict=False)[0]
    return np.stack([np.asarray(picture) for picture in VaeImageProcessor().postprocess(decoded)])


def stretched(vae: nn.Module) -> nn.Module:
    """The same with a last convolution of more contrast: an untrained one gives grey only."""
    last = vae.decoder.conv_out if isinstance(vae, AutoencoderKL) else vae.decoder.layers[-1]
    last.weight.mul_(4)
    return vae


@pytest.mark.parametrize("kind", VAES)
def test_image_is_that_of_diffusers_byte_by_byte(kind: str) -> None:
    vae = stretched(VAES[kind]())
    latent = latents(vae)
    image = Decoder(vae)(latent).numpy()
    expected = as_diffusers(vae, latent)
    assert image.shape == (2, 24, 20, 3)
    assert image.dtype == np.uint8
    assert (expected.min(), expected.max()) == (0, 255)
    assert len(np.unique(expected)) > 200
    assert np.array_equal(image, expected)


def test_taesd_reads_the_latent_as_the_generator_gives_it() -> None:
    vae = tiny()
    latent = latents(vae)
    raw = vae.decode(latent).sample
    assert torch.equal(Decoder(vae)(latent), ((raw / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1))


def test_a_vae_that_normalises_its_channels_is_refused() -> None:
    with pytest.raises(InputError, match="latents_mean in its config"):
        Decoder(full(latents_mean=(0.1,) * 4, latents_std=(1.0,) * 4))


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("kind", ["full", "tiny"])
def test_decoder_graphs_take_any_batch_and_size(tmp_path: Path, kind: str, opset: int) -> None:
    decoder = Decoder(stretched(VAES[kind]())).eval()
    axes = {"latent": {0: "batch", 2: "height", 3: "width"}}
    write_graph(decoder, {"latent": torch.randn(2, 4, 6, 8)}, ["image"], axes, tmp_path / "decoder.onnx", opset=opset)
    engine = load_engine("cpu", tmp_path / "decoder.onnx")
    for batch, height, width in ((1, 8, 8), (3, 5, 12)):
        latent = torch.randn(batch, 4, height, width)
        image, expected = engine(latent=latent.numpy())["image"], decoder(latent).numpy()
        assert image.shape == (batch, 2 * height, 2 * width, 3)
        assert image.dtype == np.uint8
        apart = np.abs(image.astype(int) - expected)
        # Where a value lies between two levels to the last bit, either is right.
        assert apart.max() <= 1
        assert apart.mean() < 1e-3
