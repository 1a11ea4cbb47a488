"""What is distilled: a teacher's folder, files of prompts, and where the student goes."""

from dataclasses import dataclass
from pathlib import Path

from snoopi_rt.errors import InputError
from snoopi_rt.export.training.recipe import Recipe


@dataclass(frozen=True)
class Task:
    """What is distilled. teacher: a diffusers folder. student: where it starts from, none is the teacher's own weights.

    prompts, negatives: files of prompts (.txt, .jsonl, .parquet); negatives for NASA-T. edits: a file of what negatives should do, see
    edits.py. clip: a folder of a CLIPModel with its tokenizer. states: the folder of all text states, none is one in `out`.
    """

    backbone: str
    teacher: Path
    prompts: Path
    out: Path
    student: Path | None = None
    negatives: Path | None = None
    edits: Path | None = None
    clip: Path | None = None
    states: Path | None = None

    def states_folder(self, name: str) -> Path:
        """Where the text states of that name are kept."""
        return (self.states or self.out / "states") / name

    def check(self, recipe: Recipe) -> None:
        """Raises InputError where the recipe asks for what is not given, or leaves out what is."""
        if (recipe.edit_weight > 0) != (self.edits is not None):
            raise InputError("edits need both: a file of them and an edit_weight above 0")
        if self.negatives is not None and not recipe.vsd_weight:
            raise InputError("NASA-T needs a vsd_weight above 0")
        if (recipe.nasa_max > 0) != (self.negatives is not None or self.edits is not None):
            raise InputError("negatives and edits need a nasa_max above 0, and a nasa_max above 0 needs one of them")
        if recipe.adversarial_weight and not (recipe.warm_steps or recipe.warm_weight):
            raise InputError("the discriminator needs the teacher's pictures: a warm_weight above 0")
        if recipe.clip_weight and not recipe.vsd_weight:
            raise InputError("the clamped CLIP loss needs a vsd_weight above 0")
        if (recipe.clip_weight > 0) != (self.clip is not None):
            raise InputError("the clamped CLIP loss needs both: a CLIP model and a clip_weight above 0")
