"""How many, of which colour, and both of two: attributes that a prompt names, relative to composed real images of the same scenes.

Each counter's error is how often it is wrong on those.
"""

from collections.abc import Iterator, Sequence

from snoopi_rt.export.evaluation.report import ReportRow, share
from snoopi_rt.export.evaluation.samplers import Sampler
from snoopi_rt.export.evaluation.small.counters import NUMBERS, Counters
from snoopi_rt.export.small_model.dataset.scene import Scene, plain_caption
from snoopi_rt.export.small_model.dataset.vocabulary import COLOURS

EACH = 3  # colours, and partners, of each thing


def attributes(sampler: Sampler, counters: Counters) -> Iterator[ReportRow]:
    """Shares of images that have what was asked for, relative to real ones."""
    numbered = [Scene((name,), count=number) for name in counters.countable for number in NUMBERS]
    colours = list(COLOURS)
    coloured = [
        Scene((name,), colour=colours[(EACH * i + k) % len(colours)]) for i, name in enumerate(counters.colourable) for k in range(EACH)
    ]
    for name, goal, scenes, counter in (
        ("number of things, one to three", 0.80, numbered, counters.number),
        ("coloured thing", 0.85, coloured, counters.colour),
        ("both of two things", 0.60, pairs(counters.common, EACH), counters.both),
    ):
        pictures = sampler([plain_caption(scene) for scene in scenes], list(range(len(scenes))))
        right, real = counter(pictures, scenes), counter(counters.domain.real(scenes, pictures.shape[1]), scenes)
        detail = {}
        if counter is counters.number:
            detail = {str(number): float(right[[scene.count == number for scene in scenes]].mean()) for number in NUMBERS}
        ceiling = float(real.mean())
        yield share("attributes", name, right, goal if sampler.kind == "student" else None, ceiling, 1 - ceiling, **detail)


def pairs(names: Sequence[str], each: int) -> list[Scene]:
    """Different things beside each other, each with `each` partners from all over the list."""
    steps = [(1 + 2 * k) * len(names) // (2 * each) or 1 for k in range(each)]
    return [Scene((name, names[(i + step) % len(names)])) for step in dict.fromkeys(steps) for i, name in enumerate(names)]
