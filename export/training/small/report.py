"""One evaluation of the small domain: everything measured of a bundle and of its teacher, as one JSON and one picture."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import snoopi_rt
from snoopi_rt.export.training.sheet import contact_sheet
from snoopi_rt.export.training.small import pixel_metrics
from snoopi_rt.export.training.small.concepts import CONCEPTS
from snoopi_rt.export.training.small.drawers import bundle_drawer, reconstructed, teacher_drawer
from snoopi_rt.export.training.small.emoji import BACKGROUNDS, QUALITIES, fetch_sprites
from snoopi_rt.export.training.small.evaluate import Drawer, Limits, asked, nearness, plain, real_pictures, share
from snoopi_rt.export.training.small.figures import plot
from snoopi_rt.export.training.small.removal import cases, removed, unrelated_change
from snoopi_rt.export.training.small.scorer import KINDS, NAMES, STEPS, Kind, Scorer, Sprites, examples, open_scorer, scorer_file
from snoopi_rt.export.weights.files import fingerprint
from snoopi_rt.files import write_whole

TEACHER_STEPS = 25
GUIDANCES = (1.5, 2.0, 2.5, 3.5, 5.0)
SCALES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0)
"""Of the largest that a kind of guidance takes: 1 is something else to each."""
SHOWN = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the scale that is the default."""


@dataclass(frozen=True)
class Extent:
    """How much is measured. captions: held-out ones; samples: pictures for distances; unwanted: pictures of each case of removal,
    found among at most `most`; swept: of each case and scale of the sweep;
    limiting: real pictures by which the flaws' limits are set; scorer_steps: of a scorer that must be trained first."""

    captions: int = 500
    samples: int = 5000
    unwanted: int = 300
    most: int = 36_000
    swept: int = 64
    limiting: int = 2000
    scorer_steps: int = 3000


TINY = Extent(8, 32, 2, 8, 2, 120, 5)
"""For the test of the road."""


def evaluate(
    bundles: dict[str, Path | None], teacher: Path, scorers_folder: Path, out: Path, extent: Extent, say: Callable[[str], None]
) -> dict[str, Any]:
    """The document, written to `out` as evaluation.json with evaluation.png, samples.png and negative_scale.png beside it.

    bundles: by name, None is the embedded one; all are swept over the scale, and the first is measured in full, beside its teacher.
    scorers_folder: where trained scorers are kept; drawings are fetched to `out`, where scorers of fewer steps are
    kept too. Raises what load, Pipeline.generate and open_scorer do.
    """
    out.mkdir(parents=True, exist_ok=True)
    sprites = fetch_sprites(out / "npm")
    scorers = [_scorer(kind, scorers_folder, out, extent.scorer_steps) for kind in KINDS]
    say("real pictures")
    real, captions, qualities = real_pictures(sprites, max(extent.samples, extent.limiting), 0)
    other, _, _ = real_pictures(sprites, extent.samples, 1)

    def limits_of(pipe: snoopi_rt.Pipeline | None) -> Limits:
        return Limits.of(reconstructed(real[: extent.limiting], teacher / "vae", pipe), qualities[: extent.limiting])

    document: dict[str, Any] = {"scorers": _of_real(scorers, sprites)}
    own_limits = limits_of(None)
    if known := _known_teacher(out, teacher, extent, own_limits):
        document["teacher"] = known
    path = out / "evaluation.json"

    def keep() -> None:
        write_whole(path, (json.dumps(document, indent=1) + "\n").encode())

    document["bundles"] = {}
    for number, (name, folder) in enumerate(bundles.items()):
        with snoopi_rt.load(folder) as pipe:
            draw, guidance = bundle_drawer(pipe), pipe.bundle.guidance
            document["bundles"][name] = found = {"hash": pipe.bundle.hash, "guidance": guidance.kind, "scale": guidance.scale.default}
            limits = limits_of(pipe)
            found["limits"], found["limits right"] = limits.values, limits.right
            say(f"{name}: negative scales")
            found["largest"] = guidance.scale.max
            found["sweep"] = sweep(draw, scorers[0], limits, guidance.scale.max, extent)
            keep()
            if number == 0:
                say(f"{name}: held-out captions")
                found["asked"] = asked(draw, scorers, limits, extent.captions)
                say(f"{name}: distances")
                made = draw(captions[: extent.samples], list(range(extent.samples)))
                found["nearness"] = nearness(made, real[: extent.samples], other, scorers)
                keep()
                say(f"{name}: negative prompts")
                found["removal"] = [removed(draw, case, None, extent.unwanted, extent.most) for case in cases(scorers[0], limits)]
                found["unrelated"] = unrelated_change(draw, None)
                keep()
                sheets(draw, limits, guidance.scale.default, out)
    if known is None:
        document["teacher"] = _of_teacher(teacher, scorers, own_limits, captions, real, other, extent, say)
    keep()
    plot(document, list(bundles), out / "evaluation.png")
    return document


def sweep(draw: Drawer, scorer: Scorer, limits: Limits, largest: float, extent: Extent) -> dict[str, Any]:
    """By scale, over the flaws asked for: the share left, the things kept, and the levels moved, on seeds that are not reported; and the
    levels by which negatives move a clean picture that they have nothing to do with."""
    flaws = [case for case in cases(scorer, limits) if case.asked and case.negative in QUALITIES]
    found = {}
    for scale in (part * largest for part in SCALES):
        rows = [removed(draw, case, scale, extent.swept, extent.most // 4 or 4, "tuned") for case in flaws]
        rows = [row for row in rows if row["found"]]
        if not rows:
            continue
        found[f"{scale:g}"] = {
            "left": float(np.mean([row["left"]["share"] for row in rows])),
            "kept": float(np.mean([row["kept thing"]["share"] for row in rows])),
            "moved": float(np.mean([row["moved"] for row in rows])),
            "unrelated": float(np.mean(list(unrelated_change(draw, scale, extent.swept).values()))),
        }
    return found


def sheets(draw: Drawer, limits: Limits, default: float, out: Path) -> None:
    """samples.png: 64 uncurated samples, seeds 0 to 63. negative_scale.png: rows of one prompt under rising scales of its flaw.

    Of 16 seeds a row shows the one on which the negative acts most: it shows how the scale works, not how often.
    """
    order = np.random.RandomState(1).permutation(len(CONCEPTS))[:64]
    prompts = [plain(CONCEPTS[i].name, list(BACKGROUNDS)[n % len(BACKGROUNDS)]) for n, i in enumerate(order)]
    contact_sheet(draw(prompts, list(range(64))), prompts).save(out / "samples.png")
    rows, labels, scales = [], [], [part * default for part in SHOWN]
    for flaw, thing, colour in (
        ("blurry", "panda", "orange"),
        ("grayscale", "watermelon", "purple"),
        ("pixelated", "apple", "blue"),
        ("grainy", "banana", "pink"),
    ):
        prompt, metric = plain(thing, colour, flaw), pixel_metrics.FLAWS[flaw]
        before, after = (metric(draw([prompt] * 16, list(range(16)), flaw, scale)) for scale in (0.0, default))
        seed = int((before - after).argmax())
        rows += [draw([prompt], [seed], flaw, scale) for scale in scales]
        labels += [f"{flaw} {thing}, seed {seed}, --neg-scale {scale:g}" for scale in scales]
    contact_sheet(np.concatenate(rows), labels, columns=len(scales)).save(out / "negative_scale.png")


def _scorer(kind: Kind, folder: Path, out: Path, steps: int) -> Scorer:
    """The trained scorer of the folder; where it is not there, one that is trained now, in `out` if it is no whole one."""
    if not scorer_file(kind, folder).exists() and steps < STEPS:
        return open_scorer(kind, out / "scorers", out / "npm", steps)
    return open_scorer(kind, folder, out / "npm")


def _of_real(scorers: list[Scorer], sprites: Sprites) -> dict[str, Any]:
    """How often each scorer is right on clean real pictures of one thing."""
    pictures, things = examples(sprites, 1000, np.random.default_rng(5), flawed=0.0)
    names = [NAMES[thing] for thing in things]
    return {scorer.kind.name: share(scorer.right(pictures, names)) for scorer in scorers}


def _known_teacher(out: Path, folder: Path, extent: Extent, limits: Limits) -> dict[str, Any] | None:
    """What an evaluation in the same folder found of the same teacher by the same metrics: it takes minutes."""
    try:
        found = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["teacher"]
    except (OSError, ValueError, KeyError):
        return None
    # A limit differs in its last digit from machine to machine.
    same = np.allclose([found.get("limits", {}).get(flaw, np.nan) for flaw in limits.values], list(limits.values.values()), rtol=1e-6)
    return found if found.get("of") == _facts(folder, extent) and same else None


def _facts(folder: Path, extent: Extent) -> list[Any]:
    return [
        fingerprint(*sorted(folder.rglob("*.safetensors"))),
        TEACHER_STEPS,
        *GUIDANCES,
        extent.captions,
        extent.samples,
        extent.limiting,
    ]


def _of_teacher(
    folder: Path,
    scorers: list[Scorer],
    limits: Limits,
    captions: list[str],
    real: np.ndarray,
    other: np.ndarray,
    extent: Extent,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """What the teacher does at its best guidance, the one at which the most held-out things are right."""
    things = {}
    for guidance in GUIDANCES:
        say(f"teacher: guidance {guidance:g}")
        few = asked(teacher_drawer(folder, guidance, TEACHER_STEPS), scorers, limits, max(extent.captions // 5, 8), skip=10_000)
        things[guidance] = few[f"thing, scorer {scorers[0].kind.name}"]["share"]
    best = max(things, key=lambda guidance: things[guidance])
    draw = teacher_drawer(folder, best, TEACHER_STEPS)
    say(f"teacher: held-out captions and distances at guidance {best:g}")
    made = draw(captions[: extent.samples], list(range(extent.samples)))
    return {
        "of": _facts(folder, extent),
        "guidance": best,
        "limits": limits.values,
        "limits right": limits.right,
        "things by guidance": {f"{guidance:g}": value for guidance, value in things.items()},
        "asked": asked(draw, scorers, limits, extent.captions),
        "nearness": nearness(made, real[: extent.samples], other, scorers),
    }
