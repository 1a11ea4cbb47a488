"""Clean pictures under negatives that name nothing of them: nothing that an eye could see may change."""

from collections.abc import Iterator

from snoopi_rt.export.evaluation import pixel_metrics
from snoopi_rt.export.evaluation.domain import Domain
from snoopi_rt.export.evaluation.judge import TOP
from snoopi_rt.export.evaluation.report import Goal, Row, mean
from snoopi_rt.export.evaluation.samplers import Negative, Sampler
from snoopi_rt.export.evaluation.statistics import frechet, ratio_interval
from snoopi_rt.export.small_model.dataset.scene import Scene, plain_caption
from snoopi_rt.export.small_model.dataset.vocabulary import COLOURS, FLAWS, NEUTRAL

GENERIC = "blurry, low quality, ugly, deformed, watermark, bad anatomy"
UNRELATED = "a bicycle"
SECTION = "clean pictures under negatives"


def clean(sampler: Sampler, domain: Domain, seeds: int) -> Iterator[Row]:
    """For each negative: what it changes of the common things' pictures, several seeds of each."""
    names = [name for name in domain.common if name not in UNRELATED for _ in range(seeds)]
    scenes = [Scene((name,)) for name in names]
    prompts, numbers = [plain_caption(scene) for scene in scenes], list(range(len(names)))
    plain = sampler(prompts, numbers)
    real = domain.judge.features(domain.real(scenes, plain.shape[1])).numpy()
    features = domain.judge.features(plain)
    seen, distance = domain.judge.ranks(features, names) < TOP, frechet(features.numpy(), real)
    across, beside = pixel_metrics.seams(plain, sampler.cell)
    blockiness = across.sum() / beside.sum()
    absent = {name: _absent_colour(domain, name) for name in dict.fromkeys(names)}
    negatives: dict[str, Negative] = {flaw: flaw for flaw in FLAWS}
    negatives |= {"generic list": GENERIC, UNRELATED: UNRELATED, "absent colour": [absent[name] for name in names]}
    for label, negative in negatives.items():
        pictures = sampler(prompts, numbers, negative)
        yield mean(SECTION, f"{label}, change of the thing", pixel_metrics.change(plain, pictures), "levels", Goal(most=3))
        features = domain.judge.features(pictures)
        gained = (domain.judge.ranks(features, names) < TOP).astype(float) - seen
        yield mean(SECTION, f"{label}, recognition gained", 100 * gained, "points", Goal(-1, 1))
        ratio = frechet(features.numpy(), real) / distance
        yield Row(SECTION, f"{label}, Frechet distance", ratio, Goal(most=1.03), "of no negative's", of=len(names))
        across, beside = pixel_metrics.seams(pictures, sampler.cell)
        low, high = ratio_interval(across, beside)
        interval = float(low / blockiness), float(high / blockiness)
        ratio = float(across.sum() / beside.sum() / blockiness)
        yield Row(SECTION, f"{label}, blockiness", ratio, Goal(most=1), "of no negative's", of=len(names), interval=interval)


def _absent_colour(domain: Domain, name: str) -> str:
    """The colour of which the thing's drawing has least."""
    colours = [colour for colour in COLOURS if colour not in NEUTRAL]
    # By all colours: black lines are not brown.
    shares = pixel_metrics.colour_share(domain.judge.composer.draw(Scene((name,)), None, 64), list(COLOURS))
    return min(colours, key=lambda colour: shares[list(COLOURS).index(colour)])
