"""Presets: rows that hold together, and settings by hand."""

import math
from dataclasses import fields

import pytest

from snoopi_rt.errors import InputError
from snoopi_rt.export.guidance import GUIDANCE
from snoopi_rt.export.one_step import OneStepRule
from snoopi_rt.export.presets.choose import default_preset, find_preset
from snoopi_rt.export.presets.preset import FACTS, SETTABLE, Preset, override
from snoopi_rt.export.presets.rows import DEFAULT_PRESET, PRESETS
from snoopi_rt.export.presets.table import markdown, table

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
    with pytest.raises(InputError, match="unknown backbone 'flux', choose from small, pixart, sd15, sd21, sdxl, sana"):
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
        ("timestpe=400", r"unknown setting 'timestpe' \(did you mean timestep\?\), choose from prediction, timestep, schedule, alpha"),
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
