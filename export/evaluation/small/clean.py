"""Clean images under negatives that name nothing of them: nothing that an eye could see may change."""

from collections.abc import Iterator

import numpy as np

from snoopi_rt.export.evaluation import pixel_metrics
from snoopi_rt.export.evaluation.harm import Harm, Seen
from snoopi_rt.export.evaluation.report import Goal, ReportRow, mean
from snoopi_rt.export.evaluation.samplers import NegativeTexts, Sampler
from snoopi_rt.export.evaluation.small.domain import Domain
from snoopi_rt.export.evaluation.small.judge import TOP
from snoopi_rt.export.small_model.dataset.scene import Scene, plain_caption
from snoopi_rt.export.small_model.dataset.vocabulary import COLOURS, FLAWS, NEUTRAL

GENERIC = "blurry, low quality, ugly, deformed, watermark, bad anatomy"
UNRELATED = "a bicycle"
SECTION = "clean pictures under negatives"


def clean(sampler: Sampler, domain: Domain, seeds: int) -> Iterator[ReportRow]:
    """For each negative: what it changes of the common things' images, several seeds of each."""
    names = [name for name in domain.common if name not in UNRELATED] * seeds
    scenes = [Scene((name,)) for name in names]
    prompts, numbers = [plain_caption(scene) for scene in scenes], list(range(len(names)))

    def seen(pictures: np.ndarray) -> Seen:
        features = domain.judge.features(pictures)
        return Seen(domain.judge.ranks(features, names) < TOP, features.numpy(), *pixel_metrics.seams(pictures, sampler.cell))

    plain = sampler(prompts, numbers)
    harm = Harm(seen(plain), domain.real_features(scenes, plain.shape[1]).numpy(), rounds=seeds)
    absent = {name: _absent_colour(domain, name) for name in dict.fromkeys(names)}
    negatives: dict[str, NegativeTexts] = {flaw: flaw for flaw in FLAWS}
    negatives |= {"generic list": GENERIC, UNRELATED: UNRELATED, "absent colour": [absent[name] for name in names]}
    for label, negative in negatives.items():
        pictures = sampler(prompts, numbers, negative)
        yield mean(SECTION, f"{label}, change of the thing", pixel_metrics.change(plain, pictures), "levels", Goal(most=3), rounds=seeds)
        yield from harm.rows(SECTION, label, seen(pictures), Goal(-1, 1))


def _absent_colour(domain: Domain, name: str) -> str:
    """The colour of which the thing's drawing has least."""
    colours = [colour for colour in COLOURS if colour not in NEUTRAL]
    # By all colours: black lines are not brown.
    shares = pixel_metrics.colour_share(domain.judge.composer.draw(Scene((name,)), None, 64), list(COLOURS))
    return min(colours, key=lambda colour: shares[list(COLOURS).index(colour)])
