"""The settings of PG-SB, all of them, and the recipes that papers and this project give them. Data alone: no torch."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from snoopi_rt.errors import InputError
from snoopi_rt.export.training import stage_recipe

Teachers = Literal["both", "frozen", "lora", "none"]
Weight = Literal["dmd", "swiftbrush", "epsilon", "x0"]


@dataclass(frozen=True)
class Recipe(stage_recipe.Recipe):
    """How a student is distilled. Raises InputError for values that cannot be.

    batch: of one step over all processes. micro_batch: of one forward on one process, 0 is all that it has of a batch.
    precision: of the networks; their masters, the optimisers and all arithmetic between networks are fp32. checkpointing: activations
    are computed again in the backward pass instead of being kept.

    kappa ~ U(kappa_min, kappa_max) on the teachers of kappa_on, one draw a sample or one a batch; elsewhere the mean. lora_kappa: above 0
    it is the LoRA teacher's scale instead; at 1, as in DMD, the student learns the guided teacher and not the teacher. t_min to t_max: the
    timesteps of the VSD gradient, and of the discriminator; weight: see pgsb.vsd_gradient. lora_rank: 0 makes the LoRA teacher a full copy.
    lora_weighted: see pgsb.lora_loss. empty: the share of prompts that the LoRA teacher sees as the empty one, without which guidance on it
    means nothing.

    timestep: what the student is fed, -1 is the backbone's. student_rank: 0 trains all of the student, else a LoRA that is merged at the
    end. warm_steps: so many steps first that bring the student near the teacher's own pictures of warm_pairs pairs of noise and prompt,
    drawn in warm_calls calls at guidance kappa's mean. warm_weight: that distance's part of the loss in the steps after them (the
    regression loss of DMD, which keeps what VSD alone forgets). nasa_max: above 0 the student runs with NASA at a scale of U(0, nasa_max)
    and the frozen teacher has the negative in place of the empty prompt (NASA-T, v3 section 4.3), by the same share of it.
    edit_weight: of what a negative prompt should do to a picture, at scales up to nasa_max (see edits.py). adversarial_weight: of a
    discriminator on the frozen teacher's features, whose real pictures are those of the warm_pairs (see adversarial.py); heads_lr: its own
    learning rate. vsd_weight: of VSD; 0 leaves it and the LoRA teacher out. clip_weight: of the clamped
    CLIP loss, falling linearly to 0. collapse: the deviation of clean latents below which the run stops; theirs is about 1.
    """

    micro_batch: int = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    checkpointing: bool = False
    kappa_min: float = 0.5
    kappa_max: float = 4.0
    kappa_on: Teachers = "both"
    kappa_per: Literal["sample", "batch"] = "sample"
    lora_kappa: float = 0.0
    t_min: int = 20
    t_max: int = 980
    weight: Weight = "dmd"
    timestep: int = -1
    student_rank: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup: int = 100
    decay_from: float = 1.0
    ema: float = 0.999
    lora_rank: int = 64
    lora_alpha: int = 128
    lora_lr: float = 1e-3
    lora_steps: int = 1
    lora_weighted: bool = False
    empty: float = 0.1
    warm_steps: int = 0
    warm_pairs: int = 16_384
    warm_calls: int = 10
    warm_weight: float = 0.0
    nasa_max: float = 0.0
    vsd_weight: float = 1.0
    edit_weight: float = 0.0
    adversarial_weight: float = 0.0
    heads_lr: float = 1e-3
    clip_weight: float = 0.0
    clip_threshold: float = 0.37
    collapse: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in get_type_hints(Recipe).items():
            value = getattr(self, name)
            if choices := get_args(kind):
                self._require(value in choices, f"{name} is {value!r}, choose from {', '.join(choices)}")
        for low, high in (("kappa_min", "kappa_max"), ("t_min", "t_max")):
            self._require(getattr(self, low) <= getattr(self, high), f"{low} is above {high}")
        self._require(self.t_min >= 0 and self.t_max <= 999, "timesteps lie between 0 and 999")
        for name in ("empty", "beta1", "beta2", "ema", "decay_from"):
            self._require(0 <= getattr(self, name) <= 1, f"{name} must lie between 0 and 1")
        counts = ("micro_batch", "student_rank", "lora_rank", "warm_steps", "warmup")
        weights = ("vsd_weight", "warm_weight", "edit_weight", "adversarial_weight", "clip_weight")
        for name in (*counts, *weights, "lora_kappa", "nasa_max", "collapse"):
            self._require(getattr(self, name) >= 0, f"{name} must not be negative")
        for name in ("warm_pairs", "warm_calls", "clip", "lora_lr", "lora_steps", "lora_alpha", "heads_lr"):
            self._require(getattr(self, name) > 0, f"{name} must be above 0")
        self._require(
            self.vsd_weight + self.warm_weight > 0 or self.warm_steps == self.steps,
            "nothing keeps the student good: set vsd_weight or warm_weight",
        )

    def _require(self, condition: bool, message: str) -> None:
        if not condition:
            raise InputError(f"recipe: {message}")


# SNOOPI v1, table 6, and v3: AdamW, LoRA of rank 64 and scale 128, clamped CLIP loss 0.1 to 0 at tau 0.37 for those who have CLIP.
# w(t), the timesteps and the share of empty prompts are those of SwiftBrush's trainer, since the papers do not state them.
_SNOOPI: dict[str, Any] = {
    "batch": 64,
    "lr": 1e-6,
    "weight": "swiftbrush",
    "lora_weighted": True,
    "checkpointing": True,
    "ema": 0.9999,
    "warmup": 500,
}
_SMALL: dict[str, Any] = {"batch": 32, "kappa_min": 1.0, "kappa_max": 3.5, "beta1": 0.0, "beta2": 0.99, "ema": 0.998}
RECIPES = {
    "small": Recipe(3000, lr=1e-4, **_SMALL, decay_from=0.7),
    "snoopi-sd15": Recipe(60_000, **_SNOOPI),
    "snoopi-sd21": Recipe(40_000, **_SNOOPI),
    "snoopi-pixart": Recipe(50_000, **{**_SNOOPI, "batch": 32}, kappa_max=3.0),
    "swiftbrush-sd21": Recipe(60_000, **{**_SNOOPI, "lora_alpha": 108}, kappa_min=4.5, kappa_max=4.5),
}
"""By name; `swiftbrush-sd21` has the fixed scale that PG-SB replaces."""
DEFAULT = {"small": "small", "sd15": "snoopi-sd15", "sd21": "snoopi-sd21", "pixart": "snoopi-pixart"}
"""The recipe of each backbone where none is named."""


def find_recipe(name: str) -> Recipe:
    """The recipe of that name. Raises InputError, naming the known ones."""
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}, choose from {', '.join(RECIPES)}")
    return RECIPES[name]


def table() -> str:
    """All recipes side by side, a line a setting."""
    columns = [
        ["setting", *RECIPES],
        *([field.name, *(f"{getattr(recipe, field.name)}" for recipe in RECIPES.values())] for field in fields(Recipe)),
    ]
    widths = [max(len(row[i]) for row in columns) for i in range(len(RECIPES) + 1)]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in columns)


def described(recipe: Any) -> str:
    """Every setting of a recipe, a line each."""
    width = max(len(field.name) for field in fields(recipe))
    return "\n".join(f"{name:{width}}  {value}" for name, value in asdict(recipe).items())
