"""The parts of the stage that trains a student's decoder, and the tool that chooses decoders; test_training.py runs the stage itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from snoopi_rt.export.small_model.discriminator import Discriminator, DiscriminatorWeights, fooling, hinge
from snoopi_rt.export.small_model.features import CHANNELS, FeatureMaps
from snoopi_rt.export.small_model.networks import HIGH, PixelShuffleDecoder, WideDecoder
from snoopi_rt.export.small_model.student_decoder import StudentDecoderRecipe, _Training

ROOT = Path(__file__).parents[2]


def test_windows_of_a_light_decoders_pictures_are_those_of_the_whole_pictures() -> None:
    torch.manual_seed(0)
    decoder = WideDecoder().decoder.eval()
    for name, parameter in decoder.named_parameters():
        if name.endswith("b.weight"):
            nn.init.normal_(parameter, std=0.05)  # residual blocks begin with nothing
    latents, corners = torch.randn(3, 8, 16, 16), [[0, 32], [13, 7], [32, 32]]
    with torch.no_grad():
        whole, cut = decoder(latents), decoder.windows(latents, corners, 32)
    assert whole.shape == (3, 3, 256, 256) and whole.std() > 0.01
    for picture, window, (y, x) in zip(whole, cut, corners, strict=True):
        torch.testing.assert_close(window, picture[:, HIGH * y : HIGH * y + 128, HIGH * x : HIGH * x + 128], rtol=1e-4, atol=1e-5)


def test_a_discriminator_learns_to_tell_pictures_apart_and_its_gradient_leads_to_real_ones() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator()
    weights = DiscriminatorWeights(discriminator)
    maps = [torch.zeros(2, channels, 8, 8) for channels in CHANNELS]
    fake, real = ([torch.full((2, 3, 32, 32), level), *(part + level for part in maps)] for level in (-0.5, 0.5))
    for _ in range(30):
        loss = hinge(discriminator(fake[0], fake[1:]), discriminator(real[0], real[1:]))
        loss.backward()
        weights.step(3e-3)
    fakes, reals = (discriminator(images, features) for images, *features in (fake, real))
    assert len(fakes) == 5 and loss < 1.5  # 2 is chance
    assert all(a.mean() < b.mean() for a, b in zip(fakes, reals, strict=True))
    images = fake[0].clone().requires_grad_(True)
    fooling(discriminator(images, fake[1:])).backward()
    assert images.grad is not None and images.grad.mean() < 0  # lighter, as the real ones are, fools it better


def test_the_discriminators_gradient_is_the_recipes_share_of_all_others() -> None:
    parts = torch.zeros(4, 1, 8, 16, 16), np.zeros((1, 256, 256, 3), np.uint8), FeatureMaps(deep=True), PixelShuffleDecoder()
    training = _Training(WideDecoder(), StudentDecoderRecipe(adversarial=0.5), *parts, compiled=False, new=True)
    drawn = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss, fooled = drawn.square().sum(), 7 * drawn.sum()
    strength = training._strength(training.begins, loss, fooled, drawn)
    shares = [torch.autograd.grad(part, drawn)[0].norm() for part in (strength * fooled, loss)]
    torch.testing.assert_close(shares[0], 0.5 * shares[1])


def test_a_plain_colour_has_no_edge_in_the_last_stages_of_a_light_decoder() -> None:
    torch.manual_seed(0)
    decoder = WideDecoder().decoder.high.eval()
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.1)  # residual blocks begin with nothing
    with torch.no_grad():
        picture = decoder(torch.randn(1, 32, 1, 1).expand(1, 32, 16, 16))
    cells = picture.unfold(2, HIGH, HIGH).unfold(3, HIGH, HIGH)  # all cells alike, whatever a cell shows
    torch.testing.assert_close(cells, cells[:, :, 8:9, 8:9].expand_as(cells), rtol=1e-4, atol=1e-4)
    assert cells[0, 0, 8, 8].std() > 0.01


def test_fine_detail_of_images_of_two_sizes_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    import latent_ceiling

    drawings = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    assert latent_ceiling.detail_share(drawings, drawings) == 1
    with pytest.raises(ValueError, match="cannot be compared"):
        latent_ceiling.detail_share(drawings.repeat(2, 1).repeat(2, 2), drawings)


def test_gradient_directions_tell_a_drawing_from_another_and_from_a_soft_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    import latent_ceiling

    place = np.indices((256, 256))
    disc, bars = (np.hypot(*(place - 128)) < 80), (place[1] // 32) % 2 == 0
    drawings = np.stack([np.repeat(255 * shape[..., None], 3, 2) for shape in (disc, bars)]).astype(np.uint8)
    darker = (drawings // 2).astype(np.uint8)
    np.testing.assert_allclose(latent_ceiling.direction_agreement(darker, drawings), 1, atol=1e-3)
    assert (latent_ceiling.direction_agreement(drawings[::-1], drawings) < 0.5).all()
    assert (latent_ceiling.direction_agreement(np.full_like(drawings, 9), drawings) == 0).all()
