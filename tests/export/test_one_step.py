"""One-step and few-step rules are diffusers' own schedulers, and give the numbers that follow from the published schedules."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, LCMScheduler

from snoopi_rt.export.one_step import SCHEDULES, OneStepRule, linear_schedule

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PIXART = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
SHAPE = (2, 4, 8, 8)


def rule(prediction, *timesteps, schedule="sd", **more):
    first, *later = (
        OneStepRule(prediction, t, math.sqrt(SCHEDULES[schedule][t]), math.sqrt(1 - SCHEDULES[schedule][t]), **more) for t in timesteps
    )
    return OneStepRule(**{**vars(first), "later": tuple(later)})


def toy(x_t, timestep):
    """A network: depends on every input, mixes pixels, answers of size 1."""
    return torch.sin(x_t + 0.3 * x_t.roll(1, -1) + timestep / 300)


def noises(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Computed in double precision from SD and PIXART, the betas of the models' scheduler files: schedule, t, alphas_cumprod, alpha, sigma,
# sigma / alpha.
COMPUTED = [
    ("sd", 399, 0.426086, 0.65275, 0.75757, 1.161),
    ("sd", 800, 0.0368696, 0.19201, 0.98139, 5.111),
    ("sd", 999, 0.0046601, 0.06826, 0.99767, 14.61),
    ("pixart", 400, 0.193572, 0.43997, 0.89801, 2.041),
    ("pixart", 999, 4.03583e-5, 0.00635, 0.99998, 157.4),
]


@pytest.mark.parametrize(("schedule", "t", "cumprod", "alpha", "sigma", "gain"), COMPUTED)
def test_schedules_give_the_numbers_of_the_published_betas(schedule, t, cumprod, alpha, sigma, gain):
    one_step = rule("epsilon", t, schedule=schedule)
    assert SCHEDULES[schedule][t] == pytest.approx(cumprod, rel=3e-6)
    assert (one_step.alpha, one_step.sigma) == (pytest.approx(alpha, abs=6e-6), pytest.approx(sigma, abs=6e-6))
    assert one_step.error_gain == pytest.approx(gain, rel=5e-4)


@pytest.mark.parametrize(("schedule", "config"), [("sd", SD), ("pixart", PIXART)])
def test_schedules_are_those_of_diffusers(schedule, config):
    expected = DDPMScheduler(**config).alphas_cumprod.double()
    torch.testing.assert_close(torch.from_numpy(SCHEDULES[schedule]), expected, rtol=2e-4, atol=0)  # float32 over 1000 products
    assert len(linear_schedule(0.0001, 0.02, 50)) == 50


@pytest.mark.parametrize(
    ("prediction", "theirs", "t", "schedule", "config"),
    [
        ("epsilon", "epsilon", 400, "pixart", PIXART),
        ("epsilon", "epsilon", 999, "sd", SD),
        ("v", "v_prediction", 999, "pixart", PIXART),
        ("x0", "sample", 999, "sd", SD),
    ],
)
def test_one_step_is_the_clean_sample_of_ddpm(prediction, theirs, t, schedule, config):
    scheduler = DDPMScheduler(**config, prediction_type=theirs, clip_sample=False)
    noise = noises(*SHAPE)
    expected = scheduler.step(toy(noise, t), t, noise).pred_original_sample
    latent = rule(prediction, t, schedule=schedule).run(lambda _, x_t: toy(x_t, t), noise)
    torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
def test_an_euler_student_is_a_rule_whose_input_is_scaled_by_sigma():
    scheduler = EulerDiscreteScheduler(**SD, timestep_spacing="trailing")
    scheduler.set_timesteps(1)
    (t,) = scheduler.timesteps
    noise = noises(*SHAPE)
    x = noise * scheduler.init_noise_sigma
    expected = scheduler.step(toy(scheduler.scale_model_input(x, t), float(t)), t, x).prev_sample
    latent = rule("epsilon", 999, input_scale=math.sqrt(1 - SCHEDULES["sd"][999])).run(lambda _, x_t: toy(x_t, 999), noise)
    torch.testing.assert_close(latent, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    raw = rule("epsilon", 999).run(lambda _, x_t: toy(x_t, 999), noise)
    assert (raw - expected).abs().max() > 1e-3 * expected.abs().max()  # the two conventions are not interchangeable


def test_instaflow_is_one_euler_step_from_noise():
    noise = noises(*SHAPE)
    latent = OneStepRule("reversed_velocity", 1000.0, 0.0, 1.0).run(lambda _, x_t: toy(x_t, 1000), noise)
    assert torch.equal(latent, noise + toy(noise, 1000))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("timesteps", [(999, 499), (999, 749, 499, 249)])  # DMD2's own four
def test_few_steps_are_diffusers_lcm_scheduler(timesteps, prediction):
    theirs = {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
    scheduler = LCMScheduler(**SD, prediction_type=theirs)
    scheduler.set_timesteps(timesteps=list(timesteps))
    generator = torch.Generator().manual_seed(7)
    expected = noise = noises(*SHAPE)
    for t in scheduler.timesteps:
        expected = scheduler.step(toy(expected, float(t)), t, expected, generator=generator).prev_sample
    again = torch.Generator().manual_seed(7)
    renoise = torch.stack([torch.randn(SHAPE, generator=again) for _ in timesteps[1:]], 1)
    latent = rule(prediction, *timesteps).run(lambda i, x_t: toy(x_t, timesteps[i]), noise, renoise)
    torch.testing.assert_close(latent, expected, rtol=1e-4, atol=1e-4)
    other = rule(prediction, *timesteps).run(lambda i, x_t: toy(x_t, timesteps[i]), noise, renoise.flip(1) + 1)
    assert (other - expected).abs().max() > 0.1


@pytest.mark.parametrize("t", [999, 249])
def test_what_lcm_mixes_in_beside_is_below_float32(t):
    c_skip, c_out = LCMScheduler(**SD).get_scalings_for_boundary_condition_discrete(t)
    assert c_skip < 2**-24 and 1 - c_out < 2**-24


def test_a_later_step_is_called_with_its_own_number_and_its_own_noise():
    calls = []

    def network(i, x_t):
        calls.append((i, x_t))
        return torch.zeros_like(x_t)

    two = OneStepRule("x0", 999, 0.0, 1.0, later=(OneStepRule("x0", 499, 0.6, 0.8),))
    renoise = noises(2, 1, 4, 8, 8, seed=1)
    two.run(network, noises(*SHAPE), renoise)
    assert [i for i, _ in calls] == [0, 1] and [step.timestep for step in two.steps] == [999, 499]
    assert torch.equal(calls[1][1], 0.8 * renoise[:, 0])


def test_a_half_precision_prediction_is_read_in_float32():
    noise = noises(*SHAPE)
    latent = rule("epsilon", 999, schedule="pixart").run(lambda _, x_t: toy(x_t, 999).half(), noise.half())
    assert latent.dtype == torch.float32
    expected = rule("epsilon", 999, schedule="pixart").x0(noise.half().double(), toy(noise.half(), 999).half())
    torch.testing.assert_close(latent, expected)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "velocity", "reversed_velocity"])
def test_error_gain_is_the_measured_growth_of_an_error(prediction):
    one_step = rule(prediction, 399)
    noise, prediction = noises(*SHAPE).double(), noises(*SHAPE, seed=1).double()
    change = one_step.x0(noise, prediction + 0.25) - one_step.x0(noise, prediction)
    assert change.abs().mean() == pytest.approx(0.25 * one_step.error_gain, rel=1e-4)
