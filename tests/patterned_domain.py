"""A domain whose things are patterns of their own, a network that sees pictures as from afar, and samplers that compose them."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageDraw

from snoopi_rt.export.evaluation.report import ReportRow
from snoopi_rt.export.evaluation.samplers import NegativeTexts, Sampler
from snoopi_rt.export.small_model.dataset.scene import STYLES, Scene
from snoopi_rt.export.small_model.dataset.vocabulary import COLOURS, COUNTS, FLAWS, SIZES, plural, things, with_article

SIDE, CELL = 128, 8


class FarSighted(torch.nn.Module):
    def extract_features(self, pictures: torch.Tensor) -> torch.Tensor:
        seen = torch.nn.functional.adaptive_avg_pool2d(pictures, 10).flatten(1)
        return torch.nn.functional.pad(seen, (0, 1280 - seen.shape[1]))[..., None, None]


def sprite(number: int, style: int) -> Image.Image:
    """One pattern per thing, a little different in each style, of one hue so that it can have another colour."""
    rng = np.random.default_rng(number)
    image = Image.new("RGBA", (256, 256))
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle((8 + style, 8, 247, 247 - style), 40, fill=(214, 60, 44, 255))
    for x, y, dark in zip(*np.divmod(np.arange(25), 5), rng.random(25) < 0.4, strict=True):
        if dark:
            pen.rectangle((28 + 40 * x, 28 + 40 * y, 64 + 40 * x, 64 + 40 * y), fill=(60, 8, 8, 255))
    return image


def scene_of(prompt: str) -> Scene:
    """What a plain caption says."""
    rest: dict = {}
    if match := re.fullmatch(r"(.*) on an? (\w+) background", prompt):
        prompt, rest["background"] = match.groups()
    for style, (template, *_) in STYLES.items():
        if match := re.fullmatch(template.replace("{}", "(.*)"), prompt):
            prompt, rest["style"] = match[1], style
    if match := re.fullmatch(r"an? (\w+) picture of (.*)", prompt):
        rest["flaw"], prompt = match.groups()
    rest["stacked"] = " above " in prompt
    names = {words: thing.name for thing in things() for words in (thing.name, plural(thing.name))}
    shown = []
    for part in re.split(" and | above ", prompt):
        words = part.removeprefix("a ").removeprefix("an ")
        while words not in names:
            word, _, words = words.partition(" ")
            kinds = {"flaw": FLAWS, "colour": COLOURS, "size": SIZES, "count": {word: n for n, word in COUNTS.items()}}
            key = next(key for key, known in kinds.items() if word in known)
            rest[key] = kinds["count"][word] if key == "count" else word
        shown.append(names[words])
    return Scene(tuple(shown), **rest)


def without(scene: Scene, negative: str | None) -> Scene:
    """The scene less what the negative names."""
    if negative == scene.flaw:
        return replace(scene, flaw=None)
    if negative == f"{scene.background} background":
        return replace(scene, background=None)
    if negative == scene.colour:
        return replace(scene, colour=None)
    left = tuple(name for name in scene.things if with_article(name) != negative)
    return replace(scene, things=left or scene.things)


def drawer_of(paint: Callable[[Scene, int], np.ndarray], edit: Callable[[Scene, str | None], Scene] = without) -> Sampler:
    def draw(prompts: Sequence[str], seeds: Sequence[int], negative: NegativeTexts = None, scale: float | None = None) -> np.ndarray:
        negatives = [negative] * len(prompts) if negative is None or isinstance(negative, str) else negative
        scenes = [edit(scene_of(prompt), unwanted) for prompt, unwanted in zip(prompts, negatives, strict=True)]
        return np.stack([paint(scene, seed) for scene, seed in zip(scenes, seeds, strict=True)])

    return Sampler(draw, "student", CELL)


def by_name(rows: Iterable[ReportRow]) -> dict[str, ReportRow]:
    return {row.name: row for row in rows}
