"""PG-SB's losses against their definitions."""

import pytest
import torch

from snoopi_rt.export.training.pgsb import clamped_clip_loss, guidance_scales, guided, lora_loss, vsd_gradient, vsd_loss
from snoopi_rt.export.training.schedule import Schedule

RANDOM = torch.Generator().manual_seed(0)


def latent(*shape):
    return torch.randn(*shape, generator=RANDOM)


def test_guidance_scale_one_is_the_conditional_prediction_and_zero_the_unconditional_one():
    conditional, unconditional = latent(2, 8, 4, 4), latent(2, 8, 4, 4)
    torch.testing.assert_close(guided(conditional, unconditional, torch.ones(2, 1, 1, 1)), conditional)
    torch.testing.assert_close(guided(conditional, unconditional, torch.zeros(2, 1, 1, 1)), unconditional)


def test_both_teachers_share_one_random_guidance_scale_and_the_other_takes_the_mean_or_a_scale_of_its_own():
    uniform = torch.tensor([0.0, 0.25, 1.0])
    low_to_high, mean = torch.tensor([1.0, 1.5, 3.0]).view(3, 1, 1, 1), torch.full((3, 1, 1, 1), 2.0)
    for random_on, (frozen, lora) in {
        "both": (low_to_high, low_to_high),
        "frozen": (low_to_high, mean),
        "lora": (mean, low_to_high),
        "none": (mean, mean),
    }.items():
        scales = guidance_scales(uniform, 1.0, 3.0, random_on)
        torch.testing.assert_close(scales[0], frozen)
        torch.testing.assert_close(scales[1], lora)
        for scale in (1.0, 4.5):
            own = guidance_scales(uniform, 1.0, 3.0, random_on, scale)
            torch.testing.assert_close(own[0], frozen)
            torch.testing.assert_close(own[1], torch.full((3, 1, 1, 1), scale))


CUMPROD = torch.linspace(0.999, 0.001, 1000)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_the_right_prediction_of_every_kind_means_the_clean_latent(prediction):
    schedule = Schedule(CUMPROD, prediction)
    x0, eps, t = latent(3, 8, 4, 4), latent(3, 8, 4, 4), torch.tensor([20, 500, 900])
    clean = schedule.x0(schedule.noised(x0, eps, t), schedule.target(x0, eps, t), t)
    torch.testing.assert_close(clean, x0, atol=1e-4, rtol=1e-4)


def test_without_signal_an_epsilon_student_is_refused_and_a_v_student_is_not():
    from snoopi_rt.errors import InputError

    silent = torch.cat([CUMPROD[:-1], torch.zeros(1)])
    with pytest.raises(InputError, match="feed an earlier timestep"):
        Schedule(silent, "epsilon").rule(999)
    rule = Schedule(silent, "v").rule(999)
    noise, prediction = latent(1, 8, 4, 4), latent(1, 8, 4, 4)
    torch.testing.assert_close(rule.x0(noise, prediction), -prediction)


def test_the_gradient_of_the_vsd_loss_is_the_vsd_gradient():
    x0 = latent(2, 8, 4, 4).requires_grad_()
    gradient = latent(2, 8, 4, 4)
    vsd_loss(x0, gradient).backward()
    torch.testing.assert_close(x0.grad * x0.numel(), gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("weight", ["epsilon", "swiftbrush", "x0", "dmd"])
def test_every_weight_is_of_epsilon_whatever_the_teachers_predict(prediction, weight):
    schedule, t = Schedule(CUMPROD, prediction), torch.tensor([100, 800])
    alpha, sigma = schedule.alpha_sigma(t)
    x0, eps = latent(2, 8, 4, 4), latent(2, 8, 4, 4)
    x_t = schedule.noised(x0, eps, t)
    eps_teacher, eps_lora = latent(2, 8, 4, 4), latent(2, 8, 4, 4)
    # The same predictions, in the teacher's own kind.
    implied = [(x_t - sigma * predicted) / alpha for predicted in (eps_teacher, eps_lora)]
    predictions = [
        {"epsilon": predicted, "v": (predicted - sigma * x_t) / alpha, "x0": clean}[prediction]
        for predicted, clean in zip((eps_teacher, eps_lora), implied, strict=True)
    ]
    teacher, lora = (schedule.x0(x_t, each, t) for each in predictions)
    far = (x0 - implied[0]).abs().mean((1, 2, 3), keepdim=True)
    factor = {"epsilon": torch.ones_like(alpha), "swiftbrush": sigma**2, "x0": sigma / alpha, "dmd": sigma / alpha / far}[weight]
    gradient = vsd_gradient(x0, teacher, lora, alpha, sigma, weight)
    torch.testing.assert_close(gradient, factor * (eps_teacher - eps_lora), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("weight", ["epsilon", "swiftbrush", "x0", "dmd"])
def test_descending_the_vsd_loss_moves_towards_the_teacher(weight):
    x0, teacher, half = torch.zeros(1, 8, 4, 4), torch.ones(1, 8, 4, 4), torch.full((1, 1, 1, 1), 0.7)
    assert (vsd_gradient(x0, teacher, x0, half, half, weight) < 0).all()  # x0 - gradient is nearer to the teacher


def test_the_lora_loss_is_weighted_by_the_signals_share_where_swiftbrush_does_it():
    prediction, target = torch.ones(1, 8, 4, 4), torch.zeros(1, 8, 4, 4)
    alpha = torch.full((1, 1, 1, 1), 0.5)
    assert lora_loss(prediction, target, alpha, weighted=False) == 1
    assert lora_loss(prediction, target, alpha, weighted=True) == 0.25


def test_beyond_its_threshold_the_clip_loss_no_longer_pulls():
    similarity = torch.tensor([0.3, 0.5], requires_grad=True)
    loss = clamped_clip_loss(similarity, 0.37)
    loss.backward()
    assert loss.item() == pytest.approx(0.035) and similarity.grad.tolist() == [-0.5, 0.0]
