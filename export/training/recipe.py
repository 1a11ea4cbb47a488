"""How a student is distilled: every setting, in groups. Data alone: no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from snoopi_rt.errors import InputError
from snoopi_rt.export.guidance import find_guidance
from snoopi_rt.export.settings import flattened
from snoopi_rt.export.training.stage_recipe import StageRecipe

RandomOn = Literal["both", "frozen", "lora", "none"]
Weighting = Literal["dmd", "swiftbrush", "epsilon", "x0"]


@dataclass(frozen=True)
class Optimiser:
    """The student's; the LoRA teacher's is AdamW and shares betas, max_norm and warmup."""

    muon: bool = False
    """Step the matrices of transformer blocks by Muon, and all other parameters by AdamW."""

    beta1: float = 0.9
    """Decay of the gradients' mean."""
    beta2: float = 0.999
    """Decay of the squared gradients' mean."""
    weight_decay: float = 0.0
    """Of the student alone."""
    max_norm: float = 1.0
    """Gradients are clipped to this norm."""
    warmup: int = 100
    """Steps over which the learning rate rises linearly."""
    decay_from: float = 1.0
    """Share of the run after which the student's learning rate falls along a cosine to 0."""
    ema: float = 0.999
    """Decay of the student's moving average, which is what ships; 0 keeps none and saves its memory."""


@dataclass(frozen=True)
class GuidanceScale:
    """The guidance scale of the teachers, kappa ~ U(min, max): PG-SB's random scale (SNOOPI v3, section 4.2)."""

    min: float = 0.5
    """Smallest scale; 1 is no guidance."""
    max: float = 4.0
    """Largest scale; equal to min for a fixed one."""
    random_on: RandomOn = "both"
    """Teachers on which the scale is random; the others take the mean of min and max."""
    per: Literal["sample", "batch"] = "sample"
    """Whether every sample has a scale of its own."""
    lora: float = 0.0
    """Above 0: a fixed scale of the LoRA teacher. At 1, as in DMD, the student learns the guided teacher instead of the teacher."""


@dataclass(frozen=True)
class LoraTeacher:
    """The LoRA teacher, which follows what the student draws."""

    rank: int = 64
    """0: a full copy of the teacher in place of a LoRA, also called a fake score network."""
    alpha: int = 128
    """The LoRA's scale is alpha / rank."""
    lr: float = 1e-3
    """Its learning rate, which does not decay."""
    steps: int = 1
    """Its steps per step of the student."""
    weighted: bool = False
    """Whether its loss is weighted by alpha_t^2, as in SwiftBrush's code; see pgsb.lora_loss."""
    prompt_dropout: float = 0.1
    """Share of its prompts replaced by the empty one, without which guidance on it means nothing."""


@dataclass(frozen=True)
class LossSettings:
    """The settings of one loss; each loss may add its own (losses/loss.py)."""

    weight: float = 0.0
    """Its weight in the student's loss; 0 leaves the loss out."""


@dataclass(frozen=True)
class Vsd(LossSettings):
    """Variational score distillation (losses/vsd.py)."""

    weight: float = 1.0
    """Its weight in the student's loss; 0 leaves VSD and the training of the LoRA teacher out."""
    weighting: Weighting = "dmd"
    """w(t): how timesteps are weighted; see pgsb.vsd_gradient."""


@dataclass(frozen=True)
class Regression(LossSettings):
    """Distance to the teacher's own pictures (losses/regression.py): DMD's regression loss, which keeps what VSD alone forgets."""

    warmup_steps: int = 0
    """So many steps first with this loss alone, at weight 1."""
    pairs: int = 16_384
    """Pairs of noise and prompt of which the teacher draws pictures."""
    teacher_steps: int = 10
    """DDIM steps in which the teacher draws them, at the mean guidance scale."""
    features: float = 0.0
    """Weight, within this loss, of the distance in the frozen teacher's features; 0 compares latents alone."""


@dataclass(frozen=True)
class Edits(LossSettings):
    """What negative prompts should do to pictures (losses/edits.py)."""

    kept: float = 1.0
    """Weight, within this loss, of edits that must change nothing; those that change the picture have 1."""
    anchored: bool = False
    """Wanted are the pictures of the student as it begins, not as it is: no other loss is needed to keep them nearly as they were."""


@dataclass(frozen=True)
class Adversarial(LossSettings):
    """A discriminator on the frozen teacher's features (losses/adversarial.py)."""

    lr: float = 1e-3
    """Learning rate of the discriminator's heads."""


@dataclass(frozen=True)
class Clip(LossSettings):
    """The clamped CLIP loss (losses/clip.py), whose weight falls linearly to 0."""

    threshold: float = 0.37
    """Cosine similarity beyond which a picture is not pulled any closer to its prompt."""


LOSS_SETTINGS: dict[str, type[LossSettings]] = {
    "vsd": Vsd,
    "regression": Regression,
    "edits": Edits,
    "adversarial": Adversarial,
    "clip": Clip,
}
"""By the name of the loss; `losses.register` adds to it."""


@dataclass(frozen=True)
class StudentRecipe(StageRecipe):
    """How a student is distilled. Raises InputError for values out of range."""

    steps: int = 3000
    """Optimiser steps of the whole run."""
    batch: int = 32
    """Samples per step, over all processes."""
    lr: float = 1e-4
    """Peak learning rate of the student."""
    micro_batch: int = 0
    """Samples per forward pass; 0 takes all that a process has of a batch."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the networks; master weights, optimisers and all arithmetic between networks are fp32."""
    checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them: less memory, more time."""
    timestep: int = -1
    """Timestep that the student is fed; -1 is the backbone's."""
    student_rank: int = 0
    """0 trains all of the student; above 0 a LoRA of that rank, merged at the end."""
    t_min: int = 20
    """First timestep to which VSD and the discriminator noise the student's pictures."""
    t_max: int = 980
    """Last of those timesteps."""
    negative_scale_max: float = 0.0
    """Above 0: the student takes negative prompts, at a scale from U(0, negative_scale_max)."""
    negative_kind: str = "nasa"
    """The guidance by which it takes them, as `export --guidance` has it."""
    collapse: float = 0.05
    """The run stops when the deviation of the student's latents falls below this; that of real ones is about 1."""
    optimiser: Optimiser = field(default_factory=Optimiser)
    guidance: GuidanceScale = field(default_factory=GuidanceScale)
    lora: LoraTeacher = field(default_factory=LoraTeacher)
    losses: Mapping[str, LossSettings] = field(default_factory=lambda: {name: kind() for name, kind in LOSS_SETTINGS.items()})
    """The settings of every registered loss, by its name: `vsd.weight`, `clip.threshold`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        find_guidance(self.negative_kind, negative=True)
        settings = flattened(self)
        for low, high in (("guidance.min", "guidance.max"), ("t_min", "t_max")):
            _require(settings[low] <= settings[high], f"{low} is above {high}")
        _require(self.t_min >= 0 and self.t_max <= 999, "timesteps lie between 0 and 999")
        for name in SHARES:
            _require(0 <= settings[name] <= 1, f"{name} must lie between 0 and 1")
        for name in (*NOT_NEGATIVE, *(f"{loss}.weight" for loss in self.losses)):
            _require(settings[name] >= 0, f"{name} must not be negative")
        for name in POSITIVE:
            _require(settings[name] > 0, f"{name} must be above 0")
        _require(not settings["edits.anchored"] or settings["edits.weight"] > 0, "edits.anchored needs an edits.weight above 0")
        kept = settings["vsd.weight"] + settings["regression.weight"] > 0 or settings["regression.warmup_steps"] == self.steps
        kept |= settings["edits.anchored"]
        _require(kept, "nothing keeps the student good: set vsd.weight, regression.weight or edits.anchored")

    @property
    def mean_guidance_scale(self) -> float:
        """The mean of the random guidance scale."""
        return (self.guidance.min + self.guidance.max) / 2


SHARES = ("lora.prompt_dropout", "optimiser.beta1", "optimiser.beta2", "optimiser.ema", "optimiser.decay_from")
NOT_NEGATIVE = (
    "edits.kept",
    "regression.features",
    "micro_batch",
    "student_rank",
    "negative_scale_max",
    "collapse",
    "lora.rank",
    "guidance.lora",
    "optimiser.warmup",
    "regression.warmup_steps",
)
POSITIVE = (
    "optimiser.max_norm",
    "lora.alpha",
    "lora.lr",
    "lora.steps",
    "regression.pairs",
    "regression.teacher_steps",
    "adversarial.lr",
)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(f"recipe: {message}")
