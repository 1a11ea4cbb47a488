"""What is counted of pictures.

Composed real ones come out near every ceiling, noise near nothing, and what ignores a prompt is found out.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from patterned_domain import SIDE, by_name, drawer_of

from snoopi_rt.errors import InputError
from snoopi_rt.export.evaluation.samplers import Sampler
from snoopi_rt.export.evaluation.small.attributes import attributes, pairs
from snoopi_rt.export.evaluation.small.clean import UNRELATED, clean
from snoopi_rt.export.evaluation.small.counters import Counters
from snoopi_rt.export.evaluation.small.domain import Domain
from snoopi_rt.export.evaluation.small.judge import Judge, ranks
from snoopi_rt.export.evaluation.small.natural import NaturalPrompt, natural, read_natural
from snoopi_rt.export.evaluation.small.recognition import recognition
from snoopi_rt.export.evaluation.small.removal import removal
from snoopi_rt.export.evaluation.small.sharpness import sharpness
from snoopi_rt.export.small_model.dataset.scene import Scene
from snoopi_rt.export.small_model.dataset.sprites import UNSEEN
from snoopi_rt.export.small_model.dataset.vocabulary import plural, things, with_article


def test_recognition_of_real_pictures_is_the_ceiling_and_of_noise_is_chance(domain: Domain, real: Sampler, noise: Sampler) -> None:
    assert (domain.judge.ceiling() == 0).mean() > 0.9
    rows = by_name(recognition(real, domain, 2))
    assert all(row.met for row in rows.values()) and min(row.value or 0 for row in rows.values()) > 0.95
    blind = by_name(recognition(noise, domain, 2))
    chance = 5 / len(domain.names)
    assert all((row.value or 0) < 2 * chance and not row.met for row in blind.values())
    missing = blind["things whose drawing is in the top 5, in one of 2 seeds"].detail["missing"]
    assert len(missing) > len(domain.names) / 2


def test_ranks_count_what_is_nearer() -> None:
    references = torch.eye(3) + 0.1
    assert ranks(torch.tensor([[1.0, 0.5, 0.0]] * 3), references, [0, 1, 2]).tolist() == [0, 1, 2]


def test_features_of_scenes_are_kept_on_disk(domain: Domain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scenes = [Scene((name,), count=count) for name in domain.names for count in (1, 2, 3)]
    first = domain.judge.of_scenes(scenes)
    monkeypatch.setattr(domain.judge, "_features", domain.judge._kept(domain.judge._folder / domain.judge._file))
    monkeypatch.setattr(domain.judge, "features", None)  # would fail if it were called
    torch.testing.assert_close(domain.judge.of_scenes(scenes), first)
    (tmp_path / "damaged").write_bytes(b"no features")
    assert domain.judge._kept(tmp_path / "damaged") == domain.judge._kept(tmp_path / "absent") == {}


def test_features_of_real_pictures_are_those_of_each_seed_and_computed_once(domain: Domain, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = [Scene((name,)) for name in domain.names[:3]] * 2
    features = domain.real_features(scenes, SIDE, seed=3)
    plain = domain.judge.features(domain.real(scenes, SIDE, seed=3))
    torch.testing.assert_close(features, plain, rtol=1e-3, atol=1e-3)
    # The same scene twice is two pictures.
    assert not torch.allclose(features[0], features[3], atol=1e-3)
    monkeypatch.setattr(domain.judge, "features", None)  # would fail if it were called
    assert torch.equal(domain.real_features(scenes, SIDE, seed=3), features)
    with pytest.raises(TypeError):
        domain.real_features(scenes, SIDE, seed=4)


def test_features_that_ship_are_those_of_the_drawings_and_the_network_of_today(tmp_path: Path) -> None:
    judge = Judge(tmp_path, names=["cat", "castle"])
    scenes = [Scene(("cat",)), Scene(("castle",), style=UNSEEN.style), Scene(("cat",), count=3)]
    assert len(judge._features) > 2000, "copy the file that `eval small` leaves in --references to export/evaluation"
    shipped = judge.of_scenes(scenes)
    judge._features.clear()
    torch.testing.assert_close(judge.of_scenes(scenes), shipped, rtol=2e-3, atol=2e-3)


def test_attributes_of_real_pictures_are_there_and_those_that_are_ignored_are_not(
    counters: Counters, real: Sampler, noise: Sampler
) -> None:
    rows = by_name(attributes(real, counters))
    assert all(row.met and (row.error or 0) < 0.1 for row in rows.values()), rows
    assert all((row.value or 0) < 0.2 for row in attributes(noise, counters))
    one = by_name(
        attributes(drawer_of(paint(counters), lambda scene, _: replace(scene, count=1, colour=None, things=scene.things[:1])), counters)
    )
    assert one["number of things, one to three"].value == pytest.approx(1 / 3, abs=0.05)
    assert one["number of things, one to three"].detail == {"1": 1, "2": 0, "3": 0}
    assert (one["coloured thing"].value or 0) < 0.3 and (one["both of two things"].value or 0) < 0.2


def paint(counters: Counters) -> Callable[[Scene, int], np.ndarray]:
    return lambda scene, seed: counters.domain.judge.composer.draw(scene, np.random.default_rng([99, seed]), SIDE)


def test_pairs_are_of_two_things_each_with_several_partners() -> None:
    for names in ("abcdefghij", "ab"):
        scenes = pairs(list(names), 3)
        assert all(len(set(scene.things)) == 2 for scene in scenes) and len(scenes) == len(set(scenes)) <= 3 * len(names)
    assert len(pairs(list("abcdefghij"), 3)) == 30


def test_natural_prompts_are_judged_by_what_they_name(counters: Counters, real: Sampler, noise: Sampler) -> None:
    first, second, third = counters.colourable[:3]
    rows = {
        f"{with_article(first)}": Scene((first,)),
        f"{with_article(second)} on a red background": Scene((second,), background="red"),
        f"two {plural(third)}": Scene((third,), count=2),
        f"a blue {first}": Scene((first,), colour="blue"),
        f"{with_article(first)} and {with_article(third)}": Scene((first, third)),
        f"a blurry {second}": Scene((second,), flaw="blurry"),
        "a 3d render of nothing": Scene(("nothing that is drawn",)),
    }
    prompts = [NaturalPrompt(text, scene) for text, scene in rows.items()]
    judged = by_name(natural(real, counters, prompts, seeds=2))
    assert len(judged) == 7 and all(row.value == 1 and (row.error or 0) < 0.5 for row in judged.values()), judged
    assert judged["white background where none is named"].of == 10 and judged["white background where none is named"].met
    blind = by_name(natural(noise, counters, prompts, 2))
    assert blind["white background where none is named"].value == blind["background that is named"].value == 0
    assert np.mean([row.value or 0 for row in blind.values()]) < 0.4


def test_the_natural_prompts_that_ship_can_be_read_and_others_are_one_line(tmp_path: Path) -> None:
    known = {thing.name for thing in things()}
    assert len(read_natural()) == 200 and all({*prompt.scene.things} <= known for prompt in read_natural())
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a cat"}\n')
    with pytest.raises(InputError, match=r"line 1 of .*rows.jsonl is no natural prompt"):
        read_natural(tmp_path / "rows.jsonl")


def test_clean_pictures_that_do_not_change_meet_all_and_a_blur_meets_none(domain: Domain, real: Sampler) -> None:
    rows = list(clean(real, domain, 1))
    assert len(rows) == 28 and all(row.met for row in rows), [row for row in rows if not row.met]

    def blurred(scene: Scene, _: str | None) -> Scene:
        return replace(scene, flaw="blurry") if _ else scene

    harmed = drawer_of(lambda scene, seed: domain.judge.composer.draw(scene, np.random.default_rng([99, seed]), SIDE), blurred)
    for row in clean(harmed, domain, 1):
        if "change" in row.name:
            assert row.met is False and (row.value or 0) > 3
    assert any(f"{UNRELATED}, change" in row.name for row in rows)
    twice = list(clean(harmed, domain, 2))  # intervals are over things, not over images
    assert [row.of for row in twice] == [2 * (row.of or 0) for row in rows]
    widths = [
        [row.interval[1] - row.interval[0] for row in of if row.interval and "change" in row.name]
        for of in (clean(harmed, domain, 1), twice)
    ]
    assert len(widths[0]) == len(widths[1]) == 7 and np.mean(widths[1]) > 0.8 * np.mean(widths[0])


def test_what_is_removed_is_gone_and_what_is_not_is_found_out(counters: Counters, real: Sampler) -> None:
    rows = by_name(removal(real, counters))
    assert all(row.met is not False for row in rows.values()), [row for row in rows.values() if row.met is False]
    assert all((row.value or 0) > 0.9 for name, row in rows.items() if name.endswith(": gone"))
    assert all((row.value or 0) < 0.02 for name, row in rows.items() if "never had it" in name)
    deaf = by_name(removal(drawer_of(paint(counters), lambda scene, _: scene), counters))
    assert {name: deaf[name].value for name in rows if name.endswith(": gone") and deaf[name].value != 0} == {}
    assert all(deaf[name].met for name in rows if "shown" in name and deaf[name].goal)


def test_what_is_never_shown_cannot_be_removed(counters: Counters, noise: Sampler) -> None:
    rows = by_name(removal(noise, counters))
    for what in ("blurry", "grayscale", "background", "one of two"):
        assert (rows[f"{what}: gone"].of or 0) < 5 and not rows[f"{what}: gone"].met, what


def test_sharpness_is_one_for_real_pictures_and_less_for_blurred_ones(domain: Domain, real: Sampler) -> None:
    rows = by_name(sharpness(real, domain, 60, teacher=1e9))
    assert rows["fine-detail energy"].value == pytest.approx(1, abs=0.15) and rows["fine-detail energy"].met
    assert rows["Frechet distance"].met and (rows["grainy, unasked"].value or 0) < 0.1
    soft = drawer_of(lambda scene, seed: domain.judge.composer.draw(replace(scene, flaw="blurry"), np.random.default_rng(seed), SIDE))
    blurred = by_name(sharpness(soft, domain, 60))
    assert (blurred["fine-detail energy"].value or 0) < 0.1 and (blurred["blurry, unasked"].value or 0) > 0.9
    name = "Frechet distance to real pictures"
    assert (blurred[name].value or 0) > (rows[name].value or 0) and "Frechet distance" not in blurred


def test_limits_tell_flawed_pictures_from_clean_ones_at_every_size(domain: Domain) -> None:
    for side in (SIDE, 256):
        errors = domain.limits(side).errors
        assert {flaw: error for flaw, error in errors.items() if error > 0.1} == {}


# The whole road.
