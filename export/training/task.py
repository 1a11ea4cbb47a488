"""What is distilled: a teacher's folder, files of prompts, and where the student goes."""

from dataclasses import dataclass
from pathlib import Path

from snoopi_rt.errors import InputError
from snoopi_rt.export.training.recipe import StudentRecipe
from snoopi_rt.export.training.text_states import check_states, states_key


@dataclass(frozen=True)
class Task:
    """The files and folders of a run."""

    backbone: str
    teacher: Path
    """A diffusers folder."""
    prompts: Path
    """Prompts to train on: .txt, .csv, .tsv, .json, .jsonl or .parquet."""
    out: Path
    """Where the student goes."""
    student: Path | None = None
    """A diffusers folder that the student starts from; None for the teacher's own weights."""
    negatives: Path | None = None
    """Negative prompts to train with, in the formats of `prompts`."""
    edits: Path | None = None
    """What negative prompts should do: see edits.py."""
    clip: Path | None = None
    """A folder with a CLIPModel and its tokenizer."""
    states: Path | None = None
    """The folder of all text states and of the teacher's pictures, which several runs may share; None for those in `out`."""

    def states_folder(self, name: str) -> Path:
        """Where the text states of that name are kept."""
        return (self.states or self.out / "states") / name

    @property
    def pictures_folder(self) -> Path:
        """Where the teacher's pictures are kept."""
        return (self.states or self.out) / "pictures"

    def check_states(self, file: Path, name: str) -> None:
        """Raises InputError if the text states of that name are of another file or of another text encoder."""
        check_states(self.states_folder(name), states_key(file, self.teacher / "text_encoder"))

    def check(self, recipe: StudentRecipe) -> None:
        """Raises InputError if the recipe asks for what is not there, or leaves out what is. Every loss checks its own."""
        if self.negatives is not None and not recipe.losses["vsd"].weight:
            raise InputError("negatives need a vsd.weight above 0")
        if (recipe.negative_scale_max > 0) != (self.negatives is not None or self.edits is not None):
            missing = "a file of either (--negatives, --edits)" if recipe.negative_scale_max else "--set negative_scale_max=1"
            raise InputError(f"negatives and edits need a negative_scale_max above 0 and a file: {missing} is missing")
