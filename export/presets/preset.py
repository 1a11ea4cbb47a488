"""What is known of one student, as data, and changed by hand."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from snoopi_rt.errors import InputError
from snoopi_rt.export.guidance import Guidance, find_guidance
from snoopi_rt.export.one_step import SCHEDULES, OneStepRule, Prediction


@dataclass(frozen=True)
class Preset:
    """How one student is found, called, read and decoded.

    weights: hub id of the student, empty where it is on no hub; file: its file there, empty where it is a diffusers folder; base: hub id of
    the folder with all other parts, empty where `weights` has them. non_commercial: a licence that a user has to accept, or none stated.
    timestep: one a step, 1 to 4. alpha and sigma: one a step where they are not those of `schedule` at `timestep`.
    time_ids: SDXL's original size, crop and target size, height first. size: sides in pixels. max_tokens: of T5's prompts; CLIP's are 77.
    vae_scaling: what the folder's AutoencoderKL must say. *_scale: the default negative scale of a kind of guidance, the other nag_* its
    constants. from_scheduler: the fields that must agree with the scheduler's file.
    """

    name: str
    backbone: Literal["small", "pixart", "sd15", "sd21", "sdxl"]
    weights: str
    licence: str
    source: str
    non_commercial: bool = False
    file: str = ""
    base: str = ""
    prediction: Prediction = "epsilon"
    timestep: tuple[float, ...] = (999.0,)
    schedule: Literal["sd", "pixart"] = "sd"
    alpha: tuple[float, ...] = ()
    sigma: tuple[float, ...] = ()
    input_scale: float = 1.0
    time_ids: tuple[float, ...] = ()
    vae_scaling: float = 0.18215
    size: int = 512
    max_tokens: int = 77
    nasa_scale: float = 0.2
    nag_scale: float = 2.0
    nag_tau: float = 2.5
    nag_alpha: float = 0.375
    vsf_scale: float = 1.0
    projected_scale: float = 1.0
    from_scheduler: tuple[str, ...] = ("prediction", "alpha")
    note: str = ""
    run_with_real_weights: bool = False

    def __post_init__(self) -> None:
        steps, one = len(self.timestep), len(self.timestep) == 1
        self._require(1 <= steps <= 4, f"timestep has {steps} values, a student has 1 to 4 steps")
        self._require(list(self.timestep) == sorted(set(self.timestep), reverse=True), "the timesteps must fall from step to step")
        self._require(self.timestep[-1] >= 0, "timestep must not be negative")
        for key in ("alpha", "sigma"):
            given = getattr(self, key)
            self._require(len(given) in (0, steps), f"{key} has {len(given)} values for {steps} timesteps")
            self._require(all(0 <= value <= 1 for value in given), f"{key} must lie between 0 and 1")
        self._require(one or self.prediction != "flow", "prediction flow is read in one step only")
        self._require(self.input_scale > 0, "input_scale must be above 0")
        self._require(len(self.time_ids) in (0, 6), "time_ids has six numbers")
        self._require(min(self.size, self.max_tokens, self.vae_scaling) > 0, "size, max_tokens and vae_scaling must be above 0")
        self._require(self.nag_tau >= 1, "nag_tau must be 1 or more: less would change the picture at scale 0")
        self._require(0 <= self.nag_alpha <= 1, "nag_alpha must lie between 0 and 1")
        for step in self.rule.steps:
            self._require(step.alpha > 0 or self.prediction != "epsilon", "prediction epsilon needs an alpha above 0")

    @property
    def rule(self) -> OneStepRule:
        """The rule of all steps, alpha and sigma computed where none are set."""
        alphas = self.alpha or tuple(self._scheduled_alpha(t) for t in self.timestep)
        sigmas = self.sigma or tuple(math.sqrt(1 - alpha**2) for alpha in alphas)
        first, *later = (OneStepRule(self.prediction, *step) for step in zip(self.timestep, alphas, sigmas, strict=True))
        return replace(first, input_scale=self.input_scale, later=tuple(later))

    def guidance(self, kind: str) -> Guidance:
        """That kind of guidance with this student's default scale and constants. Raises InputError for an unknown kind or a wrong scale."""
        found = find_guidance(kind)
        scale = getattr(self, f"{kind}_scale", found.default_scale)
        self._require(0 <= scale <= found.max_scale, f"{kind}_scale is {scale}, allowed is 0 to {found.max_scale}")
        return replace(
            found, default_scale=scale, fixed={name: getattr(self, f"{kind}_{name}", value) for name, value in found.fixed.items()}
        )

    def _scheduled_alpha(self, timestep: float) -> float:
        if self.prediction == "flow":
            return 0.0
        cumprod = SCHEDULES[self.schedule]
        known = timestep == int(timestep) and timestep < len(cumprod)
        self._require(known, f"schedule {self.schedule} has no timestep {timestep:g} (0 to {len(cumprod) - 1}): set alpha too")
        return math.sqrt(cumprod[int(timestep)])

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise InputError(f"preset {self.name}: {message}")


FACTS = (
    "name",
    "backbone",
    "weights",
    "file",
    "base",
    "licence",
    "non_commercial",
    "source",
    "from_scheduler",
    "note",
    "run_with_real_weights",
)
SETTABLE = tuple(field.name for field in fields(Preset) if field.name not in FACTS)


def override(preset: Preset, settings: Sequence[str]) -> Preset:
    """The preset with KEY=VALUE settings, lists separated by commas. What was set by hand is no longer compared with the scheduler.

    Raises InputError for an unknown key (naming the known ones), a value of another type, and a rule that cannot be.
    """
    kinds, given = get_type_hints(Preset), {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in SETTABLE:
            raise InputError(f"unknown setting {key!r}, choose from {', '.join(SETTABLE)}")
        try:
            given[key] = _parsed(kinds[key], value)
        except ValueError as error:
            raise InputError(f"setting {key} is {value!r}, which is not {error}") from None
    return replace(preset, **given, from_scheduler=tuple(key for key in preset.from_scheduler if key not in given))


def _parsed(kind: Any, text: str) -> Any:
    """The value of a text. Raises ValueError that says what would be one."""
    if kind == tuple[float, ...]:
        return tuple(_parsed(float, part) for part in text.split(","))
    if choices := get_args(kind):
        if text not in choices:
            raise ValueError(f"one of {', '.join(choices)}")
        return text
    try:
        value = kind(text)
    except ValueError:
        raise ValueError("a whole number" if kind is int else "a number") from None
    if not math.isfinite(value):
        raise ValueError("a finite number")
    return value


def written(value: Any) -> str:
    """A value of a field as `override` reads it."""
    if isinstance(value, tuple):
        return ",".join(map(written, value))
    return value if isinstance(value, str) else f"{value:.6g}"
