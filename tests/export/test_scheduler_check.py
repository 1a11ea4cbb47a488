"""Presets against the scheduler file that comes with the weights: confirmed, contradicted or corrected by it."""

import json
from dataclasses import replace

import pytest

from snoopi_rt.errors import InputError
from snoopi_rt.export.presets.choose import find_preset
from snoopi_rt.export.presets.preset import override
from snoopi_rt.export.presets.scheduler_check import check_scheduler, follow_scheduler

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
PIXART = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_train_timesteps": 1000}
# As published with stabilityai/sd-turbo (and, ancestral, sdxl-turbo), with keys that newer schedulers no longer take.
TURBO = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.24.0.dev0",
    **SD,
    "clip_sample": False,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "sigma_max": None,
    "sigma_min": None,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
    "timestep_type": "discrete",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
DDPM_SD = {"_class_name": "DDPMScheduler", **SD, "prediction_type": "epsilon"}
DDPM_PIXART = {"_class_name": "DDPMScheduler", **PIXART, "prediction_type": "epsilon"}
DPM_PIXART = {"_class_name": "DPMSolverMultistepScheduler", **PIXART, "prediction_type": "epsilon"}
PNDM_SD = {"_class_name": "PNDMScheduler", **SD, "skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}
EULER_SDXL = {**TURBO, "timestep_spacing": "leading"}
SHIFTED = {**EULER_SDXL, "_class_name": "TimestepShiftLCMScheduler", "shifted_timestep": 250}
EULER_FIELDS = ["prediction", "alpha", "timestep", "input_scale", "end"]


def scheduler(folder, config):
    (folder / "scheduler_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("name", "config", "confirmed"),
    [
        ("sd-turbo", TURBO, EULER_FIELDS),
        ("sdxl-turbo", {**TURBO, "_class_name": "EulerAncestralDiscreteScheduler"}, EULER_FIELDS),
        ("sdxs", TURBO, EULER_FIELDS),
        ("pixart-dmd", DDPM_PIXART, ["prediction", "alpha"]),
        ("nitro-pixart", DPM_PIXART, ["prediction", "alpha"]),
        ("swiftbrush-v2", TURBO, ["prediction", "alpha"]),
        ("nitro-sd", PNDM_SD, ["prediction", "alpha"]),
        ("dmd2-sdxl-4step", EULER_SDXL, ["prediction", "alpha"]),
        ("nitrosd-realism", SHIFTED, ["prediction", "alpha"]),  # a scheduler that diffusers does not have
        # The known exceptions: what the row says by hand is not asked of the file.
        ("yoso-pixart", DPM_PIXART, ["alpha"]),
        ("swiftbrush", DDPM_SD, ["prediction"]),
        ("dmd2-sd15", PNDM_SD, ["prediction"]),
        ("instaflow", PNDM_SD, []),
    ],
)
def test_the_schedulers_that_come_with_the_weights_confirm_the_rows(tmp_path, name, config, confirmed):
    assert check_scheduler(find_preset(name), scheduler(tmp_path, config)) == confirmed


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("nitro-sd", {**PNDM_SD, "prediction_type": "v_prediction"}, "has prediction epsilon, but .* gives v: --set prediction=v follows"),
        (
            "pixart-dmd",
            DDPM_SD,
            r"has alpha 0\.439968, but .* gives 0\.651523: --set alpha=0\.651523 follows that file, --set alpha=0\.4",
        ),
        ("hyper-sdxl", DDPM_PIXART, r"has alpha 0\.192015, but .* gives"),
        ("nitro-sd", {**DDPM_SD, "rescale_betas_zero_snr": True}, r"has alpha 0\.0682649, but .* gives 0:"),
        ("nitro-sd", {**DDPM_SD, "trained_betas": [0.004] * 1000}, r"has alpha 0\.0682649, but .* gives 0\.134"),
        ("dmd2-sdxl-4step", DDPM_PIXART, r"has alpha 0\.0682649,0\.237957,0\.526944,0\.821847, but .* gives 0\.00635\d*,"),
        ("sd-turbo", {**TURBO, "timestep_spacing": "leading"}, "has timestep 999, but .* gives 1: "),
        ("sd-turbo", DDPM_SD, "has timestep 999, but .* gives 0: "),
        ("sdxs", {**DDPM_SD, "timestep_spacing": "trailing"}, r"has input_scale 0\.997667, but .* gives 1: --set input_scale=1 follows"),
        ("pixart-dmd", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "has prediction epsilon, but .* gives velocity"),
    ],
)
def test_a_contradiction_names_both_numbers_and_the_way_out(tmp_path, name, config, message):
    with pytest.raises(InputError, match=f"preset {name} {message}") as caught:
        check_scheduler(find_preset(name), scheduler(tmp_path, config))
    assert "\n" not in str(caught.value) and "keeps the preset's" in str(caught.value)


def test_the_two_ways_out_of_a_contradiction_work(tmp_path):
    for name, config, others in (("nitro-sd", DDPM_SD, ["alpha"]), ("sd-turbo", TURBO, ["alpha", "timestep", "input_scale", "end"])):
        preset, folder = find_preset(name), scheduler(tmp_path, {**config, "prediction_type": "v_prediction"})
        assert check_scheduler(override(preset, ["prediction=v"]), folder) == others
        assert check_scheduler(override(preset, ["prediction=epsilon"]), folder) == others


def test_without_its_exception_swiftbrush_would_contradict_its_own_scheduler(tmp_path):
    strict = replace(find_preset("swiftbrush"), from_scheduler=("prediction", "alpha"))
    with pytest.raises(InputError, match=r"has alpha 0\.0685565, but .* gives 0\.06826\d"):
        check_scheduler(strict, scheduler(tmp_path, DDPM_SD))
    assert check_scheduler(override(strict, ["alpha=0.0685565"]), tmp_path) == ["prediction"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "scheduler_config.json is damaged or cut short, it is no JSON"),
        ("[]", "scheduler_config.json holds a list and not a JSON object"),
        ({**DDPM_SD, "beta_schedule": "cosine-ish"}, "cannot read the schedule of .*cosine-ish"),
        ({**DDPM_SD, "beta_start": "small"}, "cannot read the schedule of "),
        ({**DDPM_SD, "num_train_timesteps": 500}, "cannot read the schedule of .*: it has 500 timesteps, 999 is not one of them"),
    ],
)
def test_a_broken_scheduler_file_is_one_clear_line(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as caught:
        check_scheduler(find_preset("nitro-sd"), scheduler(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_scheduler_confirms_nothing(tmp_path):
    assert check_scheduler(find_preset("nitro-sd"), tmp_path) == []


@pytest.mark.parametrize(
    ("name", "config", "settings", "followed", "agreed"),
    [
        ("sd-turbo", TURBO, [], [], EULER_FIELDS),
        ("sd-turbo", DDPM_SD, [], ["input_scale=1"], ["prediction", "alpha"]),
        # Spaced for many steps, the schedule of SD 1.5 itself ends in one step at 0 or 1: the student's timestep stays.
        ("sdxs-dreamshaper", PNDM_SD, [], [], ["prediction", "alpha"]),
        # A row that is a guess follows whatever its repository says.
        ("sdxs-dreamshaper", TURBO, [], ["input_scale=0.997667"], ["prediction", "alpha", "timestep", "end"]),
        (
            "sdxs-dreamshaper",
            {**SD, "_class_name": "DEISMultistepScheduler"},
            [],
            ["end=0.999575,0.029154"],
            ["prediction", "alpha", "timestep", "input_scale"],
        ),
        ("sdxs-dreamshaper", {**DDPM_SD, "prediction_type": "v_prediction"}, [], ["prediction=v"], ["alpha"]),
        ("sdxs-dreamshaper", DDPM_PIXART, [], ["alpha=0.00635282"], ["prediction"]),
        ("pixart-dmd", DDPM_PIXART, [], [], ["prediction", "alpha"]),
        ("pixart-dmd", DDPM_SD, [], ["alpha=0.651523"], ["prediction"]),
        # A scheduler that starts from pure noise knows the timestep, unless it was set by hand.
        ("hyper-sdxl", TURBO, [], ["alpha=0.0682649", "timestep=999", "input_scale=0.997667"], ["prediction", "end"]),
        ("hyper-sdxl", TURBO, ["timestep=400"], [], ["prediction", "alpha"]),
        ("sd-turbo", {**DDPM_SD, "prediction_type": "sample"}, ["prediction=v", "input_scale=0.5"], [], ["alpha"]),
    ],
)
def test_without_a_preset_the_folders_own_scheduler_is_followed(tmp_path, name, config, settings, followed, agreed):
    chosen = override(find_preset(name), settings)
    assert follow_scheduler(chosen, scheduler(tmp_path, config), settings) == (followed, agreed)
    again = override(chosen, followed)
    assert follow_scheduler(again, tmp_path, [*settings, *followed])[0] == []


def test_what_a_scheduler_does_not_say_is_not_guessed(tmp_path):
    assert follow_scheduler(find_preset("sd-turbo"), tmp_path, []) == ([], [])
    with pytest.raises(InputError, match=r"cannot read the schedule of .*: it predicts a flow, but its sigmas are not those of a flow"):
        follow_scheduler(find_preset("pixart-dmd"), scheduler(tmp_path, {**DPM_PIXART, "prediction_type": "flow_prediction"}), [])
    with pytest.raises(InputError, match=r"cannot read the schedule of .*: it has 500 timesteps, 999 is not one of them"):
        follow_scheduler(find_preset("nitro-sd"), scheduler(tmp_path, {**DDPM_SD, "num_train_timesteps": 500}), [])
