"""A student as data: how it is found, called, read and decoded; and settings KEY=VALUE that change it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from snoopi_rt.errors import InputError
from snoopi_rt.export.guidance import Guidance, find_guidance
from snoopi_rt.export.one_step import SCHEDULES, OneStepRule, Prediction, trigflow_rule
from snoopi_rt.export.settings import parsed

MAX_STEPS = 8


@dataclass(frozen=True)
class Preset:
    """How one student is found, called, read and decoded. Raises InputError for values that cannot be."""

    name: str
    backbone: Literal["small", "pixart", "sd15", "sd21", "sdxl", "sana"]
    weights: str
    """Hub id of the student; empty if it is on no hub."""
    licence: str
    source: str
    """Where this row's values were read."""
    non_commercial: bool = False
    """Whether a user must accept the licence, because it forbids commercial use or none is stated."""
    file: str = ""
    """The student's network in `weights`: a file, a pattern for one, or a folder ("." is the root); empty for a whole diffusers model."""
    lora: str = ""
    """The student's LoRA file in `weights` (or a pattern for it), merged into the network of `base`."""
    base: str = ""
    """Hub id of the folder with all other parts; empty if `weights` has them."""
    prediction: Literal[Prediction, "trigflow"] = "epsilon"
    """What the network predicts; trigflow: a velocity, at timesteps that are angles."""
    timestep: tuple[float, ...] = (999.0,)
    """One for each of 1 to 8 steps, falling; for trigflow SCMScheduler's angles, which determine alpha and sigma."""
    schedule: Literal["sd", "pixart"] = "sd"
    """The noise schedule that alpha and sigma are taken from."""
    alpha: tuple[float, ...] = ()
    """One per step, 0 to 1; none: that of `schedule` at `timestep`."""
    sigma: tuple[float, ...] = ()
    """One per step, 0 to 1; none: sqrt(1 - alpha^2)."""
    input_scale: float = 1.0
    """What the first step's noise is multiplied by, see OneStepRule."""
    kept: tuple[float, ...] = ()
    """One per later step: how much of its noise the step before predicted, 0 to sigma, see OneStepRule; none: all of it is new."""
    end: tuple[float, ...] = (1.0, 0.0)
    """alpha and sigma at which the last step ends, see OneStepRule."""
    embedded_guidance: float = 4.5
    """The classifier-free guidance that a network with an input for it is fed: SANA-Sprint, and UNets of LCM."""
    time_ids: tuple[float, ...] = ()
    """SDXL's original size, crop and target size in pixels, height first; none: the image's own size, whole."""
    size: int = 512
    """Sides of the image in pixels."""
    max_tokens: int = 77
    """The longest prompt for T5, Gemma and MiniLM; CLIP's is always 77."""
    negative_kind: str = "nasa"
    """The guidance by which negative prompts act if an export names none."""
    nasa_scale: float = 0.2
    """The default negative scale with guidance nasa."""
    nag_scale: float = 2.0
    """The default negative scale with guidance nag."""
    nag_tau: float = 2.5
    """NAG's cap on the norm, at least 1."""
    nag_alpha: float = 0.375
    """NAG's weight of the guided output, 0 to 1."""
    vsf_scale: float = 1.0
    """The default negative scale with guidance vsf."""
    projected_scale: float = 1.0
    """The default negative scale with guidance projected."""
    from_scheduler: tuple[str, ...] = ("prediction", "alpha")
    """The fields that must agree with the folder's scheduler_config.json."""
    follows_scheduler: bool = False
    """Whether that file wins if it says otherwise, because this row's rule was not read in it."""
    checked: Literal["the hub's file", "diffusers' scheduler", "a public source", "nothing"] = "nothing"
    """What this row's rule was compared with, beside what every export does: with the scheduler file that comes with the weights."""
    note: str = ""
    """What a user should know, for example what is unverified."""
    run_with_real_weights: bool = False
    """Whether this project has drawn images with it."""

    def __post_init__(self) -> None:
        find_guidance(self.negative_kind, negative=True)
        steps = len(self.timestep)
        self._require(1 <= steps <= MAX_STEPS, f"timestep has {steps} values, a student has 1 to {MAX_STEPS} steps")
        self._require(list(self.timestep) == sorted(set(self.timestep), reverse=True), "the timesteps must fall from step to step")
        self._require(self.timestep[-1] >= 0, "timestep must not be negative")
        for key in ("alpha", "sigma"):
            values = getattr(self, key)
            self._require(len(values) in (0, steps), f"{key} has {len(values)} values for {steps} timesteps")
            self._require(all(0 <= value <= 1 for value in values), f"{key} must lie between 0 and 1")
        angles = all(0 < angle < 2 for angle in self.timestep)
        self._require(angles or self.prediction != "trigflow", "the timesteps of prediction trigflow are angles, 1.5708 at most")
        self._require(self.input_scale > 0, "input_scale must be above 0")
        self._require(len(self.kept) in (0, steps - 1), f"kept has {len(self.kept)} values for {steps - 1} later steps")
        self._require(len(self.end) == 2 and 0 < self.end[0] <= 1 and 0 <= self.end[1] < 1, "end has two numbers between 0 and 1")
        self._require(len(self.time_ids) in (0, 6), "time_ids has six numbers")
        self._require(min(self.size, self.max_tokens) > 0, "size and max_tokens must be above 0")
        self._require(self.nag_tau >= 1, "nag_tau must be 1 or more: less would change the picture at scale 0")
        self._require(0 <= self.nag_alpha <= 1, "nag_alpha must lie between 0 and 1")
        for step in self.rule.steps:
            self._require(step.alpha > 0 or self.prediction != "epsilon", "prediction epsilon needs an alpha above 0")
            self._require(0 <= step.kept <= step.sigma * (1 + 1e-4), f"kept must lie between 0 and the step's sigma, {step.sigma:.6g}")

    @property
    def rule(self) -> OneStepRule:
        """The rule of all steps, alpha and sigma computed if not set."""
        if self.prediction == "trigflow":
            return trigflow_rule(self.timestep)
        alphas = self.alpha or tuple(self._scheduled_alpha(t) for t in self.timestep)
        sigmas = self.sigma or tuple(1 - alpha if self._straight else math.sqrt(1 - alpha**2) for alpha in alphas)
        first, *later = (OneStepRule(self.prediction, *step) for step in zip(self.timestep, alphas, sigmas, strict=True))
        if self.kept:
            later = [replace(step, kept=kept) for step, kept in zip(later, self.kept, strict=True)]
        return replace(first, input_scale=self.input_scale, later=tuple(later), end=(self.end[0], self.end[1]))

    def guidance(self, kind: str | None = None) -> Guidance:
        """That kind of guidance, or negative_kind, with this student's default scale and constants.

        Raises InputError for an unknown kind or a wrong scale.
        """
        kind = kind or self.negative_kind
        guidance = find_guidance(kind)
        scale = getattr(self, f"{kind}_scale", guidance.default_scale)
        self._require(0 <= scale <= guidance.max_scale, f"{kind}_scale is {scale}, allowed is 0 to {guidance.max_scale}")
        fixed = {name: getattr(self, f"{kind}_{name}", value) for name, value in guidance.fixed.items()}
        return replace(guidance, default_scale=scale, fixed=fixed)

    @property
    def _straight(self) -> bool:
        """Whether it goes from noise to data in a straight line."""
        return self.prediction in ("velocity", "reversed_velocity")

    def _scheduled_alpha(self, timestep: float) -> float:
        if self._straight:
            return max(0.0, 1 - timestep / 1000)
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
    "lora",
    "base",
    "licence",
    "non_commercial",
    "source",
    "checked",
    "from_scheduler",
    "follows_scheduler",
    "note",
    "run_with_real_weights",
)
SETTABLE = tuple(field.name for field in fields(Preset) if field.name not in FACTS)


def override(preset: Preset, settings: Sequence[str]) -> Preset:
    """The preset with KEY=VALUE settings, lists separated by commas. What was set by hand is no longer compared with the scheduler.

    Raises InputError for an unknown key (naming the known ones), a value of another type, and a rule that cannot be.
    """
    values = parsed(preset, settings, names=SETTABLE)
    return replace(preset, **values, from_scheduler=tuple(key for key in preset.from_scheduler if key not in values))


def written(value: Any) -> str:
    """A value of a field as `override` reads it."""
    if isinstance(value, tuple):
        return ",".join(map(written, value))
    return value if isinstance(value, str) else f"{value:.6g}"
