"""`eval small`: everything that is measured of the embedded model, of its teacher and of its rivals, and sheets to look at."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import snoopi_rt
from snoopi_rt.errors import InputError
from snoopi_rt.export import small_model
from snoopi_rt.export.evaluation.cost import cost
from snoopi_rt.export.evaluation.figures import plot
from snoopi_rt.export.evaluation.report import Goal, ReportRow, write
from snoopi_rt.export.evaluation.samplers import Sampler, open_student, open_teacher
from snoopi_rt.export.evaluation.small.attributes import attributes
from snoopi_rt.export.evaluation.small.clean import clean
from snoopi_rt.export.evaluation.small.counters import Counters
from snoopi_rt.export.evaluation.small.domain import Domain
from snoopi_rt.export.evaluation.small.judge import TOP, Judge
from snoopi_rt.export.evaluation.small.natural import natural, read_natural
from snoopi_rt.export.evaluation.small.recognition import recognition
from snoopi_rt.export.evaluation.small.removal import removal
from snoopi_rt.export.evaluation.small.sharpness import FRECHET, sharpness
from snoopi_rt.export.evaluation.small.sheets import sheets
from snoopi_rt.export.evaluation.small.warnings import warnings
from snoopi_rt.export.evaluation.statistics import spread
from snoopi_rt.export.small_model.dataset.scene import DEFAULT_STYLE
from snoopi_rt.export.small_model.dataset.sprites import TRAINED
from snoopi_rt.export.small_model.dataset.vocabulary import things
from snoopi_rt.export.weights.files import fingerprint
from snoopi_rt.files import write_whole

MEASURES = ("recognition", "natural", "attributes", "sharpness", "clean", "removal", "warnings", "cost")


@dataclass(frozen=True)
class Extent:
    """How much is measured. things: all by default; seeds: of each thing, of a natural prompt, of a clean image; counted: things whose
    attributes are; samples: images whose distances are taken; limiting: see Domain; runs: images that are timed; measures: some of
    MEASURES, all by default."""

    things: int | None = None
    seeds: int = 4
    natural_seeds: int = 2
    clean_seeds: int = 4
    counted: int = 80
    samples: int = 1000
    limiting: int = 100
    runs: int | None = None
    measures: tuple[str, ...] = ()


QUICK = Extent(things=6, seeds=1, natural_seeds=1, clean_seeds=1, counted=2, samples=12, limiting=12, runs=1)


def evaluate(
    students: dict[str, Path | None],
    teacher: Path | None,
    decoder: Path | None,
    references: Path,
    out: Path,
    extent: Extent,
    say: Callable[[str], None],
) -> dict[str, list[ReportRow]]:
    """The rows of each who is judged, by name, written to `out` as small.json, small.md and small.png; sheets of the first student beside.

    students: folders of bundles or of students by name, None is the embedded bundle. decoder: of the teacher's latents, its own vae by
    default. references: where the features of reference images and the teacher's rows are kept. Raises InputError for an unknown measure,
    and what load and generate do. Sheets are drawn when everything is measured.
    """
    if unknown := [name for name in extent.measures if name not in MEASURES]:
        raise InputError(f"unknown measure {unknown[0]!r}, choose from {', '.join(MEASURES)}")
    teacher_sampler = None if teacher is None else open_teacher(teacher, decoder)
    samplers = {name: open_student(folder) for name, folder in students.items()}
    out.mkdir(parents=True, exist_ok=True)
    examiner = Examiner(_judge(references, extent), extent, say)
    who: dict[str, Any] = {}
    facts = {**examiner.facts, "who": who}
    columns: dict[str, list[ReportRow]] = {}
    distance = None
    if teacher_sampler is not None:
        who["teacher"] = teacher_sampler.facts
        known_by = [facts["judge"], facts["extent"], teacher_sampler.facts]
        columns["teacher"] = _kept(references, known_by, lambda: examiner.rows("teacher", teacher_sampler))
        distance = next((row.value for row in columns["teacher"] if row.name == FRECHET), None)
    for number, (name, sampler) in enumerate(samplers.items()):
        who[name] = sampler.facts
        columns[name] = examiner.rows(name, sampler, distance)
        if number == 0 and not extent.measures:
            say("sheets")
            sheets(sampler, teacher_sampler, examiner.domain, examiner.prompts, out)
        # The students first: what they are judged by stands beside them.
        ordered = {name: columns[name] for name in (*students, "teacher") if name in columns}
        write(out, "small", facts, ordered)
    plot(ordered, out / "small.png")
    return ordered


def _judge(references: Path, extent: Extent) -> Judge:
    # A few things in the default set do for a quick run: reading all sets takes as long as the rest of it.
    few = None if extent.things is None else spread([thing.name for thing in things() if thing.common], extent.things)
    return Judge(references, names=few, sets=[drawing for drawing in TRAINED if few is None or drawing.style == DEFAULT_STYLE])


class Examiner:
    """Everything that is measured of a student or a teacher."""

    def __init__(self, judge: Judge, extent: Extent, say: Callable[[str], None]) -> None:
        self.domain, self._extent, self._say = Domain(judge, extent.limiting), extent, say
        self._counters, self.prompts = Counters(self.domain, extent.counted), read_natural()

    @property
    def facts(self) -> dict[str, Any]:
        """By what is measured, for the report."""
        judge, ceiling = self.domain.judge, self.domain.judge.ceiling()
        return {
            "snoopi_rt": snoopi_rt.__version__,
            "extent": asdict(self._extent),
            "judge": {"network": f"efficientnet-{judge.name}", "sha256": judge.hash, "things": len(judge.names), "drawings": judge.sets},
            "ceiling": {f"top {top}": float((ceiling < top).mean()) for top in (1, TOP)},
        }

    def rows(self, name: str, sampler: Sampler, teacher: float | None = None) -> list[ReportRow]:
        """All rows. name: for the progress bar; teacher: its Frechet distance, beside which a student's is judged."""
        rows: list[ReportRow] = []
        with tqdm(self._measures(sampler, teacher).items(), desc=name, unit="measure") as bar:
            for what, measure in bar:
                bar.set_postfix_str(what)
                rows += measure()
        return rows

    def _measures(self, sampler: Sampler, teacher: float | None) -> dict[str, Callable[[], Iterator[ReportRow]]]:
        domain, counters, extent = self.domain, self._counters, self._extent
        measures: dict[str, Callable[[], Iterator[ReportRow]]] = {
            "recognition": lambda: recognition(sampler, domain, extent.seeds),
            "natural": lambda: natural(sampler, counters, self.prompts, extent.natural_seeds),
            "attributes": lambda: attributes(sampler, counters),
            "sharpness": lambda: sharpness(sampler, domain, extent.samples, teacher),
        }
        if sampler.kind == "student":
            measures["clean"] = lambda: clean(sampler, domain, extent.clean_seeds)
            measures["removal"] = lambda: removal(sampler, counters)
        if sampler.bundle and (vocabulary := sampler.bundle.vocabulary):
            measures["warnings"] = lambda: warnings(vocabulary)
        measures["cost"] = lambda: cost(sampler, extent.runs, self._say)
        return {name: measure for name, measure in measures.items() if name in (extent.measures or MEASURES)}


def _kept(folder: Path, facts: list[Any], measure: Callable[[], list[ReportRow]]) -> list[ReportRow]:
    """The rows that an earlier evaluation by the same code made of the same teacher, else new ones: they take many minutes."""
    folders = (Path(__file__).parent.parent, Path(small_model.__file__).parent)
    code = fingerprint(*sorted(file for folder in folders for kind in ("*.py", "*.txt") for file in folder.rglob(kind)))
    path = folder / f"teacher-{hashlib.sha256(json.dumps([facts, code]).encode()).hexdigest()[:16]}.json"
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        return [
            ReportRow(**{**row, "goal": row["goal"] and Goal(**row["goal"]), "interval": row["interval"] and tuple(row["interval"])})
            for row in stored
        ]
    rows = measure()
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps([asdict(row) for row in rows]).encode())
    return rows
