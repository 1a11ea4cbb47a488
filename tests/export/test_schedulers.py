"""Rules read from schedulers: they draw what diffusers' own scheduler draws, step by step, on random numbers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from snoopi_rt.errors import InputError
from snoopi_rt.export.one_step import OneStepRule
from snoopi_rt.export.presets.choose import find_preset
from snoopi_rt.export.presets.preset import Preset, override
from snoopi_rt.export.presets.scheduler_check import check_scheduler, follow_scheduler

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Euler's sigmas

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TRAILING = {**SD, "timestep_spacing": "trailing"}
SHAPE = (2, 4, 8, 8)
CASES: list[tuple[str, dict[str, Any], tuple[float, ...]]] = [
    *((kind, TRAILING, (999, 749, 499, 249)[:1]) for kind in ("DEISMultistep", "EulerDiscrete", "DDIM", "DDPM", "DPMSolverMultistep")),
    *((kind, TRAILING, (999, 499)) for kind in ("EulerDiscrete", "EulerAncestralDiscrete", "DDIM", "DDPM", "TCD")),
    ("EulerDiscrete", {**TRAILING, "prediction_type": "sample"}, (999,)),
    ("EulerDiscrete", {**TRAILING, "prediction_type": "v_prediction"}, (999, 874, 749, 624, 499, 374, 249, 124)),
    ("DDIM", {**TRAILING, "set_alpha_to_one": False, "prediction_type": "sample"}, (999, 749, 499, 249)),
    ("DEISMultistep", {**SD, "prediction_type": "v_prediction"}, (999,)),
    ("LCM", SD, (999,)),
    ("LCM", {**SD, "prediction_type": "v_prediction"}, (999, 759, 499, 259)),
    ("TCD", SD, (999,)),
    ("FlowMatchEulerDiscrete", {}, (1000,)),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}, (1000, 666, 333)),
]


def scheduler_file(folder: Path, kind: str, config: dict[str, Any]) -> Path:
    (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": f"{kind}Scheduler", **config}))
    return folder


def read(folder: Path, timesteps: tuple[float, ...]) -> Preset:
    """A preset of that many steps, corrected by the folder's file; the default of SD 1.5 follows it."""
    preset = replace(find_preset("sdxs-dreamshaper"), timestep=timesteps, prediction="x0", alpha=(0.5,) * len(timesteps))
    return override(preset, follow_scheduler(preset, folder, [])[0])


def toy(x_t: Tensor, timestep: float) -> Tensor:
    """A network: depends on every input, mixes pixels, answers of size 1."""
    return torch.sin(x_t + 0.3 * x_t.roll(1, -1) + timestep / 300)


@pytest.mark.parametrize(("kind", "config", "timesteps"), CASES, ids=lambda value: str(len(value)) if isinstance(value, tuple) else None)
def test_a_rule_read_from_a_scheduler_steps_as_that_scheduler_does(
    kind: str, config: dict[str, Any], timesteps: tuple[float, ...], tmp_path: Path
) -> None:
    rule = read(scheduler_file(tmp_path, kind, config), timesteps).rule
    unclipped = {"clip_sample": False} if kind in ("DDIM", "DDPM") else {}
    scheduler = getattr(diffusers, f"{kind}Scheduler")(**config, **unclipped)
    scheduler.set_timesteps(len(timesteps))
    noise, seeded = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(7)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        fed = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        takes_noise = {"generator": seeded} if kind in ("LCM", "TCD", "DDPM", "EulerAncestralDiscrete") else {}
        x = scheduler.step(toy(fed, float(t)), t, x, **takes_noise).prev_sample
    again = torch.Generator().manual_seed(7)
    renoise = torch.stack([torch.randn(SHAPE, generator=again) for _ in timesteps[1:]], 1) if rule.renoises else None
    latent = rule.run(lambda i, x_t: toy(x_t, rule.steps[i].timestep), noise, renoise)
    assert [step.timestep for step in rule.steps] == [pytest.approx(float(t)) for t in scheduler.timesteps]
    torch.testing.assert_close(latent, x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))
    assert bool(rule.renoises) == (len(timesteps) > 1 and kind in ("LCM", "TCD", "DDPM", "EulerAncestralDiscrete"))


@pytest.mark.parametrize(
    ("name", "kind", "config"),
    [
        ("sd-turbo", "EulerDiscrete", TRAILING),
        ("nitro-sd", "DDPM", TRAILING),
        ("sdxl-lightning-1step", "EulerDiscrete", {**TRAILING, "prediction_type": "sample"}),
        ("sdxl-lightning-2step", "EulerDiscrete", TRAILING),
        ("sdxl-lightning-4step", "EulerDiscrete", TRAILING),
        ("sdxl-lightning-8step", "EulerDiscrete", TRAILING),
        ("hyper-sdxl-lora", "TCD", SD),
        ("hyper-sd15-lora", "TCD", SD),
        ("lcm-dreamshaper", "LCM", SD),
        ("ssd-1b-lcm", "LCM", SD),
        ("segmind-vega-rt", "LCM", SD),
        ("tdm-dreamshaper", "DPMSolverMultistep", {**SD, "solver_order": 1}),
    ],
)
def test_a_row_is_the_scheduler_that_its_card_names(name: str, kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    preset = find_preset(name)
    followed, agreed = follow_scheduler(preset, scheduler_file(tmp_path, kind, config), [])
    later = ["kept"] if len(preset.timestep) > 1 else []
    assert (followed, agreed) == ([], ["prediction", "alpha", "timestep", "input_scale", *later, "end"])


def test_the_one_step_of_deis_has_the_factors_that_others_found_in_it(tmp_path: Path) -> None:
    """react-native-executorch, pull request 1307, for sdxs-512-dreamshaper."""
    rule = read(scheduler_file(tmp_path, "DEISMultistep", TRAILING), (999,)).rule
    one, zero = torch.ones(1), torch.zeros(1)
    assert float(rule.run(lambda _, x_t: zero, one)) == pytest.approx(14.642591, rel=1e-5)
    assert float(rule.run(lambda _, x_t: one, zero)) == pytest.approx(-14.579279, rel=1e-5)


@pytest.mark.parametrize("config", [TRAILING, {**TRAILING, "prediction_type": "flow_prediction"}, {**TRAILING, "use_karras_sigmas": True}])
def test_steps_of_higher_order_or_other_noise_are_one_clear_line(config: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the schedule of .*scheduler_config\.json: it") as caught:
        read(scheduler_file(tmp_path, "DPMSolverMultistep", config), (999, 749, 499, 249))
    assert "\n" not in str(caught.value)


def test_steps_that_keep_their_noise_read_no_other() -> None:
    euler = override(find_preset("dmd2-sdxl-4step"), ["kept=0.971276,0.8499,0.569709"]).rule
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    assert euler.renoises == 0 and euler.run(lambda _, x_t: x_t.sin(), noise).shape == SHAPE
    half = override(find_preset("dmd2-sdxl-4step"), ["kept=0.971276,0.4,0"]).rule
    assert half.renoises == 3 and [step.fresh for step in half.later] == [0, pytest.approx(0.749887, abs=1e-5), half.later[2].sigma]
    # A network that predicts the noise in its input brings the latent back, whatever noise is new.
    clean, more = 0.3, torch.randn(2, 3, *SHAPE[1:], generator=torch.Generator().manual_seed(1))

    def knowing(rule: OneStepRule):
        return lambda i, x_t: (x_t - rule.steps[i].alpha * clean) / rule.steps[i].sigma

    for rule in (euler, half):
        torch.testing.assert_close(rule.run(knowing(rule), noise, more), torch.full(SHAPE, clean), atol=1e-4, rtol=0)


def test_a_preset_that_contradicts_the_folders_noise_is_one_clear_line(tmp_path: Path) -> None:
    folder = scheduler_file(tmp_path, "DEISMultistep", TRAILING)
    with pytest.raises(InputError, match=r"preset sd-turbo has input_scale 0\.997667, but .* gives 1: --set input_scale=1 follows"):
        check_scheduler(find_preset("sd-turbo"), folder)
    with pytest.raises(InputError, match=r"preset sd-turbo has end 1,0, but .* gives 0\.999575,0\.02915\d: --set end=0\.999575,0\.02915"):
        check_scheduler(override(find_preset("sd-turbo"), ["input_scale=1"]), folder)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("kept=0.9", "kept has 1 values for 3 later steps"),
        ("kept=1,0,0", r"kept must lie between 0 and the step's sigma, 0\.971276"),
        ("end=1", "end has two numbers between 0 and 1"),
    ],
)
def test_nonsense_about_noise_is_one_clear_line(setting: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        override(find_preset("dmd2-sdxl-4step"), [setting])
