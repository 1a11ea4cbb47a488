"""The recipes that papers and this project give the student, by name. Data alone: no torch."""

from typing import Any

from snoopi_rt.errors import InputError
from snoopi_rt.export.settings import changed, flattened
from snoopi_rt.export.training.recipe import StudentRecipe

# SNOOPI v1, table 6, and v3: AdamW, LoRA of rank 64 and alpha 128, clamped CLIP loss 0.1 to 0 at tau 0.37 for those who have CLIP.
# w(t), the timesteps and the prompt dropout are those of SwiftBrush's trainer, since the papers do not state them.
_SNOOPI: dict[str, Any] = {
    "batch": 64,
    "lr": 1e-6,
    "checkpointing": True,
    "optimiser.ema": 0.9999,
    "optimiser.warmup": 500,
    "lora.weighted": True,
    "vsd.weighting": "swiftbrush",
}
RECIPES: dict[str, dict[str, Any]] = {
    "small": {
        "guidance.min": 1.0,
        "guidance.max": 3.5,
        "optimiser.beta1": 0.0,
        "optimiser.beta2": 0.99,
        "optimiser.ema": 0.998,
        "optimiser.decay_from": 0.7,
    },
    "embedded": {
        "steps": 512,
        "batch": 128,
        "lr": 5e-4,
        "guidance.min": 2.0,
        "guidance.max": 2.0,
        "vsd.weight": 0.0,
        "regression.weight": 1.0,
        "regression.pairs": 65_536,
        "regression.teacher_steps": 6,
        "optimiser.muon": True,
        "optimiser.beta2": 0.99,
        "optimiser.ema": 0.998,
        "optimiser.warmup": 20,
        "optimiser.decay_from": 0.4,
    },
    "snoopi-sd15": {**_SNOOPI, "steps": 60_000},
    "snoopi-sd21": {**_SNOOPI, "steps": 40_000},
    "snoopi-pixart": {**_SNOOPI, "steps": 50_000, "batch": 32, "guidance.max": 3.0},
    "swiftbrush-sd21": {**_SNOOPI, "steps": 60_000, "lora.alpha": 108, "guidance.min": 4.5, "guidance.max": 4.5},
}
"""What each recipe changes in the defaults. `embedded` is the embedded model's: its captions determine a picture, so that the distance to
what the teacher draws is enough. `swiftbrush-sd21` has the fixed guidance scale that PG-SB replaces."""
DEFAULT = {"small": "small", "sd15": "snoopi-sd15", "sd21": "snoopi-sd21", "pixart": "snoopi-pixart"}
"""The default recipe of each backbone that can be trained."""
FORMER_NAMES = {
    "beta1": "optimiser.beta1",
    "beta2": "optimiser.beta2",
    "weight_decay": "optimiser.weight_decay",
    "clip": "optimiser.max_norm",
    "warmup": "optimiser.warmup",
    "decay_from": "optimiser.decay_from",
    "ema": "optimiser.ema",
    "kappa_min": "guidance.min",
    "kappa_max": "guidance.max",
    "kappa_on": "guidance.random_on",
    "kappa_per": "guidance.per",
    "lora_kappa": "guidance.lora",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_lr": "lora.lr",
    "lora_steps": "lora.steps",
    "lora_weighted": "lora.weighted",
    "empty": "lora.prompt_dropout",
    "vsd_weight": "vsd.weight",
    "weight": "vsd.weighting",
    "warm_weight": "regression.weight",
    "warm_steps": "regression.warmup_steps",
    "warm_pairs": "regression.pairs",
    "warm_calls": "regression.teacher_steps",
    "edit_weight": "edits.weight",
    "adversarial_weight": "adversarial.weight",
    "heads_lr": "adversarial.lr",
    "clip_weight": "clip.weight",
    "clip_threshold": "clip.threshold",
    "nasa_max": "negative_scale_max",
}
"""Former names of settings, on the command line and in old checkpoints, with their present ones."""


def check_trainable(backbone: str) -> None:
    """Raises InputError for a backbone that cannot be trained here, naming those that can."""
    if backbone not in DEFAULT:
        raise InputError(f"backbone {backbone!r} cannot be trained here, choose from {', '.join(DEFAULT)}")


def find_recipe(name: str) -> StudentRecipe:
    """The recipe of that name. Raises InputError, naming the known ones."""
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}, choose from {', '.join(RECIPES)}")
    return changed(StudentRecipe(), RECIPES[name])


def table() -> str:
    """All recipes side by side, one setting per line."""
    recipes = {name: flattened(find_recipe(name)) for name in RECIPES}
    rows = [["setting", *recipes], *([name, *(f"{recipe[name]}" for recipe in recipes.values())] for name in flattened(StudentRecipe()))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def described(recipe: Any) -> str:
    """Every setting of a recipe, one per line."""
    settings = flattened(recipe)
    width = max(map(len, settings))
    return "\n".join(f"{name:{width}}  {value}" for name, value in settings.items())
