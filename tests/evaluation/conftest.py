"""The patterned domain, its counters, and samplers that draw it perfectly and not at all."""

import numpy as np
import pytest
from patterned_domain import SIDE, FarSighted, drawer_of, sprite

from snoopi_rt.export.evaluation import lite
from snoopi_rt.export.evaluation.samplers import Sampler
from snoopi_rt.export.evaluation.small import judge as judge_module
from snoopi_rt.export.evaluation.small.counters import Counters
from snoopi_rt.export.evaluation.small.domain import Domain
from snoopi_rt.export.evaluation.small.judge import Judge
from snoopi_rt.export.evaluation.statistics import spread
from snoopi_rt.export.small_model.dataset.sprites import TRAINED, UNSEEN
from snoopi_rt.export.small_model.dataset.vocabulary import COLOURS, things


@pytest.fixture(scope="session")
def domain(tmp_path_factory: pytest.TempPathFactory) -> Domain:
    drawn = {
        (thing.name, drawing.style): sprite(number, style)
        for style, drawing in enumerate((*TRAINED, UNSEEN))
        for number, thing in enumerate(things())
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lite, "load_network", lambda name, weights: FarSighted())
        patch.setattr(judge_module, "SHIPPED", tmp_path_factory.mktemp("nothing"))
        patch.setattr(judge_module, "load_sprites", lambda sets, names: {key: drawn[key] for key in drawn if key[0] in names})
        named = [thing.name for thing in things() if thing.common and not {*thing.name.split()} & {*COLOURS, "bicycle"}]
        judge = Judge(tmp_path_factory.mktemp("drawings"), names=spread(named, 30))
        judge._lite.side = 64
        assert judge.composer.has(judge.names[0], UNSEEN.style)
        return Domain(judge, limiting=30)


@pytest.fixture(scope="session")
def counters(domain: Domain) -> Counters:
    return Counters(domain, 12)


@pytest.fixture(scope="session")
def real(domain: Domain) -> Sampler:
    return drawer_of(lambda scene, seed: domain.judge.composer.draw(scene, np.random.default_rng([99, seed]), SIDE))


@pytest.fixture(scope="session")
def noise() -> Sampler:
    return drawer_of(lambda scene, seed: np.random.default_rng([98, seed]).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
