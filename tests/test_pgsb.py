"""PG-SB's losses against their definitions."""

import torch

from snoopi_rt.export.training.pgsb import guided, random_kappa, v_target, vsd_gradient, vsd_loss, x0_from_v

RANDOM = torch.Generator().manual_seed(0)


def latent(*shape):
    return torch.randn(*shape, generator=RANDOM)


def test_kappa_one_is_the_conditional_answer_and_zero_the_empty_one():
    conditional, empty = latent(2, 8, 4, 4), latent(2, 8, 4, 4)
    torch.testing.assert_close(guided(conditional, empty, torch.ones(2, 1, 1, 1)), conditional)
    torch.testing.assert_close(guided(conditional, empty, torch.zeros(2, 1, 1, 1)), empty)


def test_kappa_is_drawn_a_sample_within_its_range():
    kappa = random_kappa(4096, 0.5, 4.0, torch.Generator().manual_seed(1))
    assert kappa.shape == (4096, 1, 1, 1)
    assert 0.5 <= kappa.min() < 0.51 and 3.99 < kappa.max() <= 4.0
    assert len(kappa.unique()) > 4000


def test_v_and_x0_are_inverse():
    x0, eps = latent(3, 8, 4, 4), latent(3, 8, 4, 4)
    alpha = torch.tensor([0.0, 0.3, 1.0]).view(3, 1, 1, 1)
    sigma = (1 - alpha**2).sqrt()
    torch.testing.assert_close(x0_from_v(alpha * x0 + sigma * eps, v_target(x0, eps, alpha, sigma), alpha, sigma), x0)


def test_the_gradient_of_the_vsd_loss_is_the_vsd_gradient():
    x0 = latent(2, 8, 4, 4).requires_grad_()
    gradient = vsd_gradient(x0.detach(), latent(2, 8, 4, 4), latent(2, 8, 4, 4))
    vsd_loss(x0, gradient).backward()
    torch.testing.assert_close(x0.grad * x0.numel(), gradient, atol=1e-4, rtol=1e-4)


def test_the_vsd_gradient_has_the_papers_sign_in_epsilon():
    x0, alpha, sigma = latent(2, 8, 4, 4), torch.tensor(0.6), torch.tensor(0.8)
    x_t = alpha * x0 + sigma * latent(2, 8, 4, 4)
    teacher, lora = latent(2, 8, 4, 4), latent(2, 8, 4, 4)  # x0 predictions
    eps_difference = (x_t - alpha * teacher) / sigma - (x_t - alpha * lora) / sigma
    gradient = vsd_gradient(x0, teacher, lora)
    ratio = gradient / eps_difference
    assert (ratio > 0).all()
    torch.testing.assert_close(ratio.amin((1, 2, 3)), ratio.amax((1, 2, 3)), rtol=1e-2, atol=1e-3)  # one weight a sample


def test_descending_the_vsd_loss_moves_towards_the_teacher():
    x0, teacher = torch.zeros(1, 8, 4, 4), torch.ones(1, 8, 4, 4)
    assert (vsd_gradient(x0, teacher, lora_x0=x0) < 0).all()  # x0 - gradient is nearer to the teacher
