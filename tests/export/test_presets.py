"""Presets: rows that hold together, settings by hand, and the check against a scheduler's own file."""

import json
import math
from dataclasses import fields, replace

import pytest

from snoopi_rt.errors import InputError
from snoopi_rt.export.guidance import GUIDANCE
from snoopi_rt.export.one_step import OneStepRule
from snoopi_rt.export.presets.preset import FACTS, SETTABLE
from snoopi_rt.export.presets.rows import DEFAULT_PRESET, PRESETS, Preset, check_scheduler, default_preset, find_preset, override
from snoopi_rt.export.presets.scheduler_check import follow_scheduler
from snoopi_rt.export.presets.table import markdown, table

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


def scheduler(folder, config):
    (folder / "scheduler_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


# preset, timesteps, sigma / alpha of each step, input scale
RULES = [
    ("pixart-dmd", (400,), (2.041,), 1.0),
    ("nitro-pixart", (400,), (2.041,), 1.0),
    ("sd-turbo", (999,), (14.6146,), 0.997667),
    ("sdxl-turbo", (999,), (14.6146,), 0.997667),
    ("sdxs", (999,), (14.6146,), 0.997667),
    ("sdxs-dreamshaper", (999,), (14.6146,), 1.0),
    ("swiftbrush", (999,), (math.sqrt(0.9953 / 0.0047),), 1.0),
    ("dmd2-sd15", (999,), (math.sqrt(0.9953 / 0.0047),), 1.0),
    ("swiftbrush-v2", (999,), (14.6146,), 1.0),
    ("nitro-sd", (999,), (14.6146,), 1.0),
    ("dmd2-sdxl", (399,), (1.1606,), 1.0),
    ("hyper-sdxl", (800,), (5.111,), 1.0),
    ("nitrosd-realism", (249,), (0.69320,), 1.0),  # fed and read at the shifted timestep, as its scheduler and its ComfyUI node do
    ("nitrosd-vibrant", (499,), (1.61289,), 1.0),
    ("dmd2-sdxl-4step", (999, 749, 499, 249), (14.6146, 4.0817, 1.6129, 0.6932), 1.0),
]


@pytest.mark.parametrize(("name", "timesteps", "ratios", "input_scale"), RULES)
def test_rows_give_the_numbers_of_their_checkpoints(name, timesteps, ratios, input_scale):
    steps = find_preset(name).rule.steps
    assert tuple(step.timestep for step in steps) == timesteps
    assert [step.sigma / step.alpha for step in steps] == [pytest.approx(ratio, rel=1e-4) for ratio in ratios]
    assert steps[0].input_scale == pytest.approx(input_scale, abs=1e-6)
    assert all(step.input_scale == 1 for step in steps[1:])


def test_v_and_flow_students_do_not_magnify_errors():
    yoso, instaflow = find_preset("yoso-pixart").rule, find_preset("instaflow").rule
    assert (yoso.prediction, yoso.timestep) == ("v", 999) and yoso.error_gain == pytest.approx(0.99998, abs=1e-6)
    assert (instaflow.prediction, instaflow.timestep, instaflow.error_gain) == ("reversed_velocity", 1000, 1.0)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_every_row_is_complete(preset):
    assert preset.licence and preset.source
    assert preset.weights or "give" in preset.note, "a row without a public location says what to give"
    assert not preset.file or preset.base, "a single file needs a folder for everything else"
    assert preset.run_with_real_weights == (preset.name == "small")  # no other row was run with its real weights yet
    assert set(preset.from_scheduler) <= {"prediction", "alpha", "timestep", "input_scale", "kept", "end"}
    for kind in GUIDANCE:
        guidance = preset.guidance(kind)
        assert 0 <= guidance.default_scale <= guidance.max_scale


@pytest.mark.parametrize(
    ("name", "kind", "scale", "fixed"),
    [
        ("pixart-dmd", "nasa", 0.45, {}),  # SNOOPI v1, table 8
        ("yoso-pixart", "nasa", 0.2, {}),
        ("instaflow", "nasa", 0.19, {}),
        ("dmd2-sd15", "nasa", 0.04, {}),
        ("swiftbrush-v2", "nasa", 0.3, {}),
        ("nitro-sd", "nasa", 0.2, {}),  # SNOOPI v3: SD 2.1
        ("nitro-pixart", "nag", 4.0, {"tau": 2.5, "alpha": 0.375}),  # NAG, table 5: PixArt sigma
        ("hyper-sdxl", "nag", 2.0, {"tau": 2.5, "alpha": 0.5}),  # SDXL
        ("instaflow", "nag", 2.0, {"tau": 2.5, "alpha": 0.375}),  # SD 1.5
    ],
)
def test_negative_scales_are_the_papers(name, kind, scale, fixed):
    guidance = find_preset(name).guidance(kind)
    assert (guidance.default_scale, dict(guidance.fixed)) == (scale, fixed)
    assert guidance.attend.keywords == fixed


@pytest.mark.parametrize("backbone", DEFAULT_PRESET)
def test_a_backbone_alone_has_a_default(backbone):
    preset = default_preset(backbone)
    assert preset.backbone == backbone and bool(preset.weights) == (backbone != "small")
    assert preset.non_commercial == (backbone in ("sd21", "sdxl", "sana"))


def test_the_embedded_student_is_read_at_zero_terminal_snr():
    assert default_preset("small").rule == OneStepRule("v", timestep=999, alpha=0.0, sigma=1.0)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(InputError, match=r"unknown preset 'sd-turob', choose from small, pgsb-sd15, .*nitrosd-vibrant"):
        find_preset("sd-turob")
    with pytest.raises(InputError, match=r"unknown preset 'dmd2', choose from pgsb-sd15, sdxs-dreamshaper, dmd2-sd15, hyper.*instaflow$"):
        find_preset("dmd2", "sd15")
    with pytest.raises(InputError, match="backbone 'flux' has no preset, those with one are small, pixart, sd15, sd21, sdxl, sana"):
        default_preset("flux")
    with pytest.raises(InputError, match="unknown guidance 'cfg'"):
        find_preset("sd-turbo").guidance("cfg")


def test_a_preset_for_another_backbone_is_refused():
    assert find_preset("sd-turbo", "sd21").name == "sd-turbo"
    with pytest.raises(
        InputError, match="preset 'sd-turbo' is for backbone sd21, not pixart, choose from pgsb-pixart, pixart-dmd, yoso-pixart"
    ):
        find_preset("sd-turbo", "pixart")


def test_settings_change_the_rule():
    base = find_preset("sd-turbo")
    changed = override(base, ["timestep=400", "prediction=v", "schedule=pixart", "input_scale=1", "size=768", "nasa_scale=0.9"])
    assert (changed.rule.prediction, changed.rule.timestep, changed.rule.input_scale, changed.size) == ("v", 400, 1, 768)
    assert changed.rule.alpha == pytest.approx(0.43997, abs=1e-5)
    assert changed.guidance("nasa").default_scale == 0.9
    four = override(base, ["timestep=999,749,499,249"])
    assert [step.timestep for step in four.rule.steps] == [999, 749, 499, 249]
    by_hand = override(base, ["timestep=999,499", "alpha=0.1,0.5", "sigma=0.9,0.7"])
    assert [(step.alpha, step.sigma) for step in by_hand.rule.steps] == [(0.1, 0.9), (0.5, 0.7)]
    assert override(base, []) == base


def test_every_field_is_a_fact_or_can_be_set():
    assert {*FACTS, *SETTABLE} == {field.name for field in fields(Preset)} and not {*FACTS} & {*SETTABLE}
    assert {"timestep", "alpha", "sigma", "prediction", "input_scale", "time_ids", "size"} <= {*SETTABLE}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("timestpe=400", "unknown setting 'timestpe', choose from prediction, timestep, schedule, alpha"),
        ("licence=MIT", "unknown setting 'licence', choose from"),
        ("prediction", "setting prediction is '', which is not one of epsilon, v, x0, velocity, reversed_velocity, trigflow"),
        ("prediction=eps", "setting prediction is 'eps', which is not one of epsilon, v, x0, velocity, reversed_velocity, trigflow"),
        ("timestep=soon", "setting timestep is 'soon', which is not a number"),
        ("timestep=999,,1", "which is not a number"),
        ("timestep=nan", "which is not a finite number"),
        ("size=512x512", "setting size is '512x512', which is not a whole number"),
        ("timestep=1000", r"preset sd-turbo: schedule sd has no timestep 1000 \(0 to 999\): set alpha too"),
        ("timestep=399.5", "has no timestep 399.5"),
        ("timestep=-1", "timestep must not be negative"),
        ("timestep=249,999", "the timesteps must fall from step to step"),
        ("timestep=9,8,7,6,5,4,3,2,1", "timestep has 9 values, a student has 1 to 8 steps"),
        ("alpha=0.1,0.2", "alpha has 2 values for 1 timesteps"),
        ("alpha=2", "alpha must lie between 0 and 1"),
        ("alpha=0", "prediction epsilon needs an alpha above 0"),
        ("nag_tau=0.5", "nag_tau must be 1 or more"),
        ("time_ids=512,512", "time_ids has six numbers"),
        ("size=0", "size and max_tokens must be above 0"),
    ],
)
def test_nonsense_is_one_clear_line(setting, message):
    with pytest.raises(InputError, match=message) as caught:
        override(find_preset("sd-turbo"), [setting])
    assert "\n" not in str(caught.value)


def test_a_scale_out_of_range_is_refused():
    with pytest.raises(InputError, match=r"nasa_scale is 3\.0, allowed is 0 to 1\.5"):
        override(find_preset("sd-turbo"), ["nasa_scale=3"]).guidance("nasa")


EULER_FIELDS = ["prediction", "alpha", "timestep", "input_scale", "end"]


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
    with pytest.raises(InputError, match=r"cannot read the schedule of .*: it predicts a flow, and its sigmas are not one's"):
        follow_scheduler(find_preset("pixart-dmd"), scheduler(tmp_path, {**DPM_PIXART, "prediction_type": "flow_prediction"}), [])
    with pytest.raises(InputError, match=r"cannot read the schedule of .*: it has 500 timesteps, 999 is not one of them"):
        follow_scheduler(find_preset("nitro-sd"), scheduler(tmp_path, {**DDPM_SD, "num_train_timesteps": 500}), [])


def test_the_table_has_a_row_a_preset_and_says_which_were_run():
    head, *rows = table().splitlines()
    assert "run with real weights" in head and len(rows) == len(PRESETS)
    assert [row.split()[0].rstrip("*") for row in rows] == list(PRESETS)
    assert sum("*" in row.split()[0] for row in rows) == len(DEFAULT_PRESET)
    four = next(row for row in rows if row.startswith("dmd2-sdxl-4step"))
    assert "999,749,499,249" in four and "14.6,4.1,1.6,0.7" in four and "CC BY-NC-SA 4.0" in four and four.endswith("no")
    start = head.index("licence")
    assert all(row[start - 2 : start] == "  " for row in rows)
    assert "diffusers' scheduler" in four and table().splitlines()[1].split("  ")[0] == "small*"
    assert markdown().splitlines()[0].startswith("| preset | backbone |") and len(markdown().splitlines()) == len(PRESETS) + 2
