"""The picture set: seeded, true to its captions, split by hash; and a scorer that learns from it."""

import json

import numpy as np
import pytest

from snoopi_rt.errors import InputError, SnoopiError
from snoopi_rt.export.training.small import emoji, scorer
from snoopi_rt.export.training.small.concepts import CONCEPTS, with_article
from snoopi_rt.export.training.small.scorer import KINDS, NAMES, Scorer, examples, open_scorer


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, first_sprites):
    folder = tmp_path_factory.mktemp("pictures")
    emoji.write_set(folder, first_sprites, count=400, seed=7)
    return folder


def test_the_same_seed_gives_the_same_pictures_and_a_longer_set_begins_alike(pictures, first_sprites, tmp_path):
    emoji.write_set(tmp_path, first_sprites, count=20, seed=7)
    images, rows = emoji.open_pictures(pictures), emoji.read_rows(pictures)
    again, rows_again = emoji.open_pictures(tmp_path), emoji.read_rows(tmp_path)
    assert np.array_equal(images[:20], again)
    assert rows[:20] == rows_again


def test_another_seed_gives_other_pictures(pictures, first_sprites, tmp_path):
    emoji.write_set(tmp_path, first_sprites, count=20, seed=8)
    assert not np.array_equal(emoji.open_pictures(pictures)[:20], emoji.open_pictures(tmp_path))


def test_captions_never_name_a_colour_that_grayscale_took_away(pictures):
    for row in emoji.read_rows(pictures):
        if row.facts.quality == "grayscale" and row.facts.background not in emoji.NEUTRAL:
            assert "background" not in row.caption


def test_a_third_of_the_flaws_go_unnamed_and_some_captions_are_bare(pictures):
    rows = emoji.read_rows(pictures)
    flawed = [row for row in rows if row.facts.quality]
    named = sum(row.facts.quality in row.caption for row in flawed) / len(flawed)
    assert 0.5 < named < 0.8
    bare = sum(row.facts.name not in row.caption for row in rows) / len(rows)
    assert 0.04 < bare < 0.12


def test_pairs_stand_side_by_side_and_are_named_in_that_order(pictures):
    images, rows = emoji.open_pictures(pictures), emoji.read_rows(pictures)
    pairs = [i for i, row in enumerate(rows) if row.facts.second and row.facts.quality is None]
    assert 0.08 < sum(row.facts.second is not None for row in rows) / len(rows) < 0.22
    for i in pairs:
        facts, gap = rows[i].facts, images[i][:, 62:66].astype(int)
        assert np.abs(gap - gap[0, 0]).max() == 0, "nothing stands in the middle"
        assert facts.second != facts.concept
        if facts.name in rows[i].caption:
            assert f"{facts.name} and " in rows[i].caption and facts.second_name in rows[i].caption


def test_negatives_are_flaws_backgrounds_and_things_in_about_equal_shares(pictures):
    found = (pictures / "negatives.txt").read_text().splitlines()
    assert found == emoji.negatives() and {"blurry", "a gray background", "an apple"} <= set(found)
    flaws, backgrounds = sum(each in emoji.QUALITIES for each in found), sum(each.endswith("background") for each in found)
    assert all(0.3 < count / len(found) < 0.37 for count in (flaws, backgrounds))


def test_a_picture_of_the_test_split_can_be_asked_for(first_sprites):
    for seed in range(5):
        row, _ = emoji.compose(first_sprites, np.random.default_rng(seed), split="test")
        assert row.split == "test"


def test_the_split_is_by_composition_and_about_five_percent():
    pairs = [(concept.name, colour) for concept in CONCEPTS for colour in emoji.BACKGROUNDS]
    share = sum(emoji.split_of(*pair) == "test" for pair in pairs) / len(pairs)
    assert 0.03 < share < 0.08


def test_names_are_distinct_and_take_the_right_article():
    names = [name for concept in CONCEPTS for name in concept.names]
    assert len(set(names)) == len(names)
    assert [with_article(w) for w in ("apple", "cat", "unicorn", "umbrella", "cherries")] == [
        "an apple",
        "a cat",
        "a unicorn",
        "an umbrella",
        "cherries",
    ]


def test_a_finished_set_is_not_overwritten(pictures):
    with pytest.raises(InputError, match="already holds a picture set"):
        emoji.build(pictures, 10, 0)


def test_without_npm_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SnoopiError, match=r"npm is not installed: install Node\.js"):
        emoji.build(tmp_path / "out", 10, 0)
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_folder_without_a_set_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match="snoopi-rt data emoji --out"):
        emoji.read_rows(tmp_path)


def test_every_set_carries_its_notice_and_contact_sheet(pictures):
    assert "Microsoft" in (pictures / "NOTICE.txt").read_text()
    assert (pictures / "image_grid.png").stat().st_size > 10_000
    assert json.loads((pictures / "dataset.json").read_text())["count"] == 400


def test_a_set_whose_making_was_killed_is_made_anew(first_sprites, tmp_path):
    (tmp_path / "pictures.npy").write_bytes(b"half")
    (tmp_path / "captions.jsonl").write_text("{")
    emoji.write_set(tmp_path, first_sprites, count=3, seed=0)
    assert len(emoji.open_pictures(tmp_path)) == len(emoji.read_rows(tmp_path)) == 3


def test_a_negative_seed_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="seed must be an integer of at least 0, got -1"):
        emoji.build(tmp_path, 10, -1)


def test_a_scorer_learns_to_tell_things_it_has_seen(first_sprites, monkeypatch, tmp_path):
    monkeypatch.setattr(scorer, "fetch_sprites", lambda *given, **more: few)
    few = {key: first_sprites[key] for key in list(first_sprites)[:9:3]}  # three things whose colours differ
    monkeypatch.setattr(scorer, "_varied", lambda pictures, random: pictures)
    monkeypatch.setattr(scorer, "BATCH", 16)
    trained = open_scorer(KINDS[0], tmp_path, tmp_path / "npm", steps=40)
    pictures, things = examples(few, 60, np.random.default_rng(9), flawed=0.0)
    assert trained.right(pictures, [NAMES[thing] for thing in things]).mean() > 0.8
    again = open_scorer(KINDS[0], tmp_path, tmp_path / "npm", steps=40)
    np.testing.assert_array_equal(again(pictures)[0], trained(pictures)[0])
    assert isinstance(again, Scorer)
