"""The judges of the small domain: statistics against known values, limits, removal on pictures made for it, and the whole road."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from snoopi_rt.cli import main
from snoopi_rt.export.training.small import emoji, pixel_metrics, removal, report, scorer
from snoopi_rt.export.training.small.evaluate import Limits, compositions, plain, share
from snoopi_rt.export.training.small.removal import Case, removed
from snoopi_rt.export.training.small.scorer import KINDS, NAMES, Scorer, examples, open_scorer
from snoopi_rt.export.training.small.statistics import frechet, interval, kernel_distance, precision_recall


def test_the_frechet_distance_of_gaussians_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((200_000, 3))
    b = rng.standard_normal((200_000, 3)) * np.array([1.0, 2.0, 0.5]) + np.array([1.0, 0.0, 0.0])
    assert frechet(a, b) == pytest.approx(1 + 0 + 1 + 0.25, rel=0.03)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)


def test_the_kernel_distance_of_one_distribution_is_nothing_and_grows_with_the_shift() -> None:
    rng = np.random.default_rng(0)
    a, b, c = rng.standard_normal((1000, 4)), rng.standard_normal((1000, 4)), rng.standard_normal((1000, 4)) + 1
    assert abs(kernel_distance(a, b)) < 0.05 < kernel_distance(a, c)


def test_precision_falls_with_wrong_pictures_and_recall_with_missing_ones() -> None:
    rng = np.random.default_rng(0)
    real = rng.standard_normal((500, 2))
    wrong = np.concatenate([rng.standard_normal((250, 2)), rng.standard_normal((250, 2)) + 50])
    few = rng.standard_normal((500, 2)) * 0.05
    precision, recall = precision_recall(real, wrong)
    assert 0.4 < precision < 0.55 and recall > 0.8
    precision, recall = precision_recall(real, few)
    assert precision > 0.9 and recall < 0.2


def test_an_interval_holds_its_share_and_narrows() -> None:
    assert interval(0, 0) == (0.0, 1.0)
    wide, narrow = interval(5, 10), interval(500, 1000)
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]
    assert interval(0, 300)[0] == 0 and interval(0, 300)[1] == pytest.approx(0.0126, abs=1e-3)


@pytest.fixture(scope="module")
def real(first_sprites: dict) -> tuple[np.ndarray, list[str | None]]:
    rows = [emoji.compose(first_sprites, np.random.default_rng([3, i])) for i in range(300)]
    return np.stack([picture for _, picture in rows]), [row.facts.quality for row, _ in rows]


def test_limits_tell_flawed_pictures_from_clean_ones(real: tuple[np.ndarray, list[str | None]]) -> None:
    pictures, qualities = real
    limits = Limits.of(pictures, qualities)
    assert min(limits.right.values()) > 0.95
    for flaw in emoji.QUALITIES:
        shown = limits.shows(pictures, flaw)
        assert shown[[quality == flaw for quality in qualities]].mean() > 0.9
        assert shown[[quality is None for quality in qualities]].mean() < 0.1


def test_compositions_are_of_their_split_and_all_occur() -> None:
    stream = compositions("test")
    first = [next(stream) for _ in range(len({pair for pair, _ in zip(compositions("test"), range(500), strict=False)}))]
    assert len(set(first)) == len(first) and {emoji.split_of(*pair) for pair in first} == {"test"}


def test_removal_counts_what_is_left_and_what_is_kept() -> None:
    """A drawer whose pictures are one number: 1 shows the unwanted thing, and a negative takes it from every second seed."""

    def drawer(prompts: list[str], seeds: list[int], negative: str | None = None, scale: float | None = None) -> np.ndarray:
        assert len(prompts) == len(seeds)
        shown = [1 if seed % 4 < 2 and not (negative == "blurry" and seed % 2) else 0 for seed in seeds]
        return np.array(shown, np.uint8).reshape(-1, 1, 1, 1)

    def even(pictures: np.ndarray, pairs: list[tuple[str, str]]) -> np.ndarray:
        return pictures.reshape(len(pictures)) >= 0

    case = Case("blurry", True, plain, lambda pictures: pictures.reshape(len(pictures)) == 1, {"thing": even})
    found = removed(drawer, case, None, wanted=100, most=1000)
    assert found["found"] == 100 and found["left"]["share"] == 0.5 and found["kept thing"]["relative"] == 1.0
    assert removed(drawer, case, None, wanted=1000, most=256)["found"] == 128
    assert removed(drawer, Case("x", True, plain, lambda pictures: pictures.ravel() == 9, {}), None, 10, 256)["found"] == 0


def test_one_of_two_things_is_seen_in_its_half_and_in_the_whole_picture() -> None:
    class Sizes:
        """Sees a panda in the middle of a half that is light, a dog in a whole picture whose corner is light, and else an apple."""

        def __call__(self, pictures: np.ndarray) -> tuple[None, np.ndarray]:
            light = pictures[:, 0, 0, 0] > 0
            seen = "dog" if pictures.shape[1] == 8 else "panda"
            return None, np.where(light, NAMES.index(seen), NAMES.index("apple"))

        def right(self, pictures: np.ndarray, names: list[str]) -> np.ndarray:
            return self(pictures)[1] == [NAMES.index(name) for name in names]

    pictures = np.zeros((3, 8, 8, 3), np.uint8)
    pictures[1, 0, 0] = pictures[2, 2:6] = 255  # dark, light in its corner, light in both halves
    dog, panda = (removal._second_thing(name, Sizes()) for name in ("dog", "panda"))
    assert dog.shows(pictures).tolist() == [False, True, False] and panda.shows(pictures).tolist() == [False, False, True]
    found = {name: dog.kept["other thing"](pictures, [(name, "red")] * 3).tolist() for name in ("dog", "panda")}
    assert found == {"dog": [False, True, False], "panda": [False, False, True]}


def test_a_scorer_learns_to_tell_things_it_has_seen(first_sprites: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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


def test_the_embedded_bundle_and_its_teacher_are_judged_in_one_run(
    first_sprites: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(scorer, "fetch_sprites", lambda *given, **more: first_sprites)
    monkeypatch.setattr(report, "fetch_sprites", lambda *given, **more: first_sprites)
    monkeypatch.setattr(report, "GUIDANCES", (2.5,))
    monkeypatch.setattr(report, "SCALES", (0.0, 1.0))
    every = report.cases
    monkeypatch.setattr(
        report, "cases", lambda *given: [case for case in every(*given) if case.negative in ("blurry", "a red background", "a dog")]
    )
    monkeypatch.setattr(report, "sheets", lambda draw, *rest: drawn.append(draw(["a cat"], [0])))
    drawn: list[np.ndarray] = []
    monkeypatch.setattr(report, "TEACHER_STEPS", 2)
    teacher = Path(__file__).parent.parent / "weights" / "small" / "teacher"
    mine = tmp_path / "mine"
    asked = ["eval", "--quick", "--teacher", str(teacher), "--scorers", str(mine), "--out", str(tmp_path)]
    done = CliRunner().invoke(main, asked, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert not mine.exists() and len(list((tmp_path / "scorers").iterdir())) == 2
    document = json.loads((tmp_path / "evaluation.json").read_text())
    assert document["bundles"]["embedded"]["asked"]["background"]["of"] == document["teacher"]["asked"]["background"]["of"] == 8
    assert {row["negative"] for row in document["bundles"]["embedded"]["removal"]} >= {"blurry", "a red background", "a dog"}
    # Each is judged by what its own decoder can draw, and the embedded one draws cells with sharper edges than its teacher's.
    assert document["bundles"]["embedded"]["limits"]["pixelated"] > document["teacher"]["limits"]["pixelated"]
    assert (tmp_path / "evaluation.png").stat().st_size > 10_000 and len(drawn) == 1
    # The same teacher is not judged again by the same metrics; another is, or the same by others.
    limits = Limits(document["teacher"]["limits"], {})
    assert report._known_teacher(tmp_path, teacher, report.TINY, limits) == document["teacher"]
    nearly = Limits({flaw: value * (1 + 1e-14) for flaw, value in limits.values.items()}, {})
    assert report._known_teacher(tmp_path, teacher, report.TINY, nearly) == document["teacher"]
    assert report._known_teacher(tmp_path, teacher / "vae", report.TINY, limits) is None
    assert report._known_teacher(tmp_path, teacher, report.Extent(), limits) is None
    assert report._known_teacher(tmp_path, teacher, report.TINY, Limits({**limits.values, "blurry": 0.0}, {})) is None


def test_a_domain_that_is_not_known_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["eval", "--domain", "cats", "--teacher", str(tmp_path), "--out", str(tmp_path)])
    assert done.exit_code == 2 and "unknown domain 'cats', choose from small" in done.output


def test_a_share_has_its_interval() -> None:
    assert share(np.array([True, False]))["share"] == 0.5 and share(np.array([]))["of"] == 0
    assert pixel_metrics.FLAWS.keys() == set(emoji.QUALITIES)
