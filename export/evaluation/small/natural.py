"""Prompts as strangers type them, written before any training by someone who saw no captions, and held out: no recipe is tuned on them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from snoopi_rt.errors import InputError
from snoopi_rt.export.evaluation import pixel_metrics
from snoopi_rt.export.evaluation.report import ReportRow, share
from snoopi_rt.export.evaluation.samplers import Sampler
from snoopi_rt.export.evaluation.small.counters import Counters
from snoopi_rt.export.evaluation.small.judge import TOP
from snoopi_rt.export.small_model.dataset.scene import Scene
from snoopi_rt.export.small_model.dataset.vocabulary import DEFAULT_BACKGROUND, NEUTRAL


@dataclass(frozen=True)
class NaturalPrompt:
    """A prompt and what its image should show."""

    text: str
    scene: Scene


def read_natural(path: Path | None = None) -> list[NaturalPrompt]:
    """The prompts of a file of JSON lines, by default those that come with snoopi-rt. Raises InputError for a line of another form."""
    source, prompts = path or files("snoopi_rt.export.evaluation").joinpath("natural_prompts.jsonl"), []
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            named = {key: row[key] for key in ("count", "colour", "background", "flaw", "style")}
            prompts.append(NaturalPrompt(row["prompt"], Scene(tuple(row["things"]), **named)))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"line {number} of {path or 'the natural prompts'} is no natural prompt: {error!r}") from error
    return prompts


def natural(sampler: Sampler, counters: Counters, prompts: Sequence[NaturalPrompt], seeds: int) -> Iterator[ReportRow]:
    """What several seeds of each prompt show of what it names, relative to composed real images of the same scenes."""
    chosen = [prompt for prompt in prompts if counters.domain.can_draw(prompt.scene) for _ in range(seeds)]
    if not chosen:
        return
    scenes = [prompt.scene for prompt in chosen]
    made = sampler([prompt.text for prompt in chosen], list(range(len(chosen))))
    real = counters.domain.real(scenes, made.shape[1])
    open_ones = np.array([scene.background is None for scene in scenes])
    are_white = np.array([(scene.background or DEFAULT_BACKGROUND) == "white" for scene in scenes])
    error = float((pixel_metrics.white(real) != are_white).mean())
    goal = 0.98 if sampler.kind == "student" else None
    yield share("natural prompts", "white background where none is named", pixel_metrics.white(made)[open_ones], goal, error=error)
    for name, asked, counter in (
        (f"one thing, top {TOP}", _is_single, counters.thing),
        ("background that is named", _names_background, counters.background),
        ("number of things", lambda scene: scene.count > 1, counters.number),
        ("coloured thing", lambda scene: scene.colour and scene.count == 1 and len(scene.things) == 1, counters.colour),
        ("both of two things", lambda scene: len(scene.things) == 2 and not scene.flaw, counters.both),
        ("flaw that is named", lambda scene: scene.flaw, counters.flaw),
    ):
        rows = [i for i, scene in enumerate(scenes) if asked(scene)]
        if rows:
            few = [scenes[i] for i in rows]
            ceiling = float(counter(real[rows], few).mean())
            yield share("natural prompts", name, counter(made[rows], few), ceiling=ceiling, error=1 - ceiling)


def _is_single(scene: Scene) -> bool:
    return len(scene.things) == 1 and scene.count == 1 and not scene.colour and not scene.flaw


def _names_background(scene: Scene) -> bool:
    """A grayscale image's background has no colour."""
    return scene.background is not None and (scene.flaw != "grayscale" or scene.background in NEUTRAL)
