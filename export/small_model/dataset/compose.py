"""Pictures of scenes, composed of sprites: geometry, colours and flaws. One random generator decides what a caption leaves open."""

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageFilter

from snoopi_rt.export.small_model.dataset.scene import DEFAULT_STYLE, STYLES, Scene
from snoopi_rt.export.small_model.dataset.vocabulary import COLOURS, DEFAULT_BACKGROUND, NEUTRAL, things

CELLS = 16
"""Cells along a pixelated picture's side, and along its latent's: the autoencoder cannot represent finer ones."""
GRAINS = 32
"""Grains along a grainy picture's side."""

# Centres and sides as shares of the picture's side.
ONE = (((0.5, 0.5),), 0.815)
TWO_BESIDE = (((0.26, 0.5), (0.74, 0.5)), 0.45)
TWO_STACKED = (((0.5, 0.26), (0.5, 0.74)), 0.45)
THREE = (((0.5, 0.26), (0.26, 0.74), (0.74, 0.74)), 0.44)
SIZED = {"small": 0.45, "big": 0.97}
SHIFT, SPREAD = 0.02, 0.04  # of a thing's centre and of its side, uniform up to this share
SHADE = 4  # levels by which a background is lighter or darker; white is plain white


class Composer:
    """Draws scenes with a set of sprites: RGBA squares by (thing, style)."""

    def __init__(self, sprites: Mapping[tuple[str, str], Image.Image]):
        self._sprites = sprites
        self._coloured: dict[tuple[str, str, str], Image.Image] = {}
        self._small: dict[tuple[str, str, str | None], Image.Image] = {}

    def draw(self, scene: Scene, rng: np.random.Generator | None, side: int) -> np.ndarray:
        """The picture (side, side, 3) uint8. The same generator gives the same picture at every size, up to resampling.

        Without a generator every random choice takes its mean, and a flaw is left out.
        """
        shade = np.array(COLOURS[scene.background or DEFAULT_BACKGROUND]) + (0 if rng is None else rng.integers(-SHADE, SHADE + 1))
        picture = Image.new("RGB", (side, side), tuple(int(level) for level in shade.clip(0, 255)))
        middles, share = layout(scene)
        names = scene.things if len(scene.things) == 2 else scene.things * scene.count
        for name, middle in zip(names, middles, strict=True):
            moved, grown = (np.zeros(2), 0.0) if rng is None else (rng.uniform(-SHIFT, SHIFT, 2), rng.uniform(-SPREAD, SPREAD))
            x, y = np.array(middle) + moved * (1 if len(middles) == 1 else 0.5)
            length = round(side * share * (1 + grown))
            sprite = self._sprite(name, scene.style or DEFAULT_STYLE, scene.colour, side).resize((length, length), Image.Resampling.LANCZOS)
            picture.paste(sprite, (round(side * x - length / 2), round(side * y - length / 2)), sprite)
        return np.asarray(picture if scene.flaw is None or rng is None else _flawed(picture, scene.flaw, rng))

    def has(self, name: str, style: str) -> bool:
        """Whether the set of that style has a drawing of the thing."""
        return (name, style) in self._sprites

    def forgetful(self) -> "Composer":
        """A composer with the same sprites and caches of its own, which are freed with it."""
        return Composer(self._sprites)

    def colourable(self) -> list[str]:
        """The things that are mostly of one hue in every set, so that it can be changed; people and faces keep their colour."""
        groups = {thing.name: thing.group for thing in things()}
        return [
            name
            for name, group in groups.items()
            if group not in ("people", "places and buildings")
            and all(_dominant(self._sprites[name, style])[1] >= ONE_HUE for style in STYLES if (name, style) in self._sprites)
        ]

    def _sprite(self, name: str, style: str, colour: str | None, side: int) -> Image.Image:
        sprite = self._sprites[name, style]
        if colour is not None:
            key = (name, style, colour)
            if key not in self._coloured:
                self._coloured[key] = recoloured(sprite, colour)
            sprite = self._coloured[key]
        if side > sprite.width // 2:
            return sprite
        small = (name, style, colour)
        if small not in self._small:
            self._small[small] = sprite.resize((sprite.width // 2, sprite.height // 2), Image.Resampling.BOX)
        return self._small[small]


def layout(scene: Scene) -> tuple[tuple[tuple[float, float], ...], float]:
    """The centre of each thing and the side of all, as shares of the picture's side."""
    if len(scene.things) == 2:
        return TWO_STACKED if scene.stacked else TWO_BESIDE
    if scene.count > 1:
        return TWO_BESIDE if scene.count == 2 else THREE
    return ONE[0], SIZED[scene.size] if scene.size else ONE[1]


def _flawed(picture: Image.Image, flaw: str | None, rng: np.random.Generator) -> Image.Image:
    side = picture.width
    if flaw == "blurry":
        return picture.filter(ImageFilter.GaussianBlur(side * float(rng.uniform(0.025, 0.034))))
    if flaw == "pixelated":
        return picture.resize((CELLS, CELLS), Image.Resampling.BOX).resize(picture.size, Image.Resampling.NEAREST)
    if flaw == "grayscale":
        return picture.convert("L").convert("RGB")
    if flaw == "grainy":
        grain = rng.normal(0.0, rng.uniform(26, 36), (GRAINS, GRAINS, 1)).repeat(side // GRAINS, 0).repeat(side // GRAINS, 1)
        return Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8))
    return picture


ONE_HUE = 0.4
_NEAR = 28 / 255  # of the hue circle, to either side of the commonest hue


def _hsv(sprite: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Hue, saturation and value (H, W, 3), and alpha (H, W), in [0, 1]."""
    hsv = np.asarray(sprite.convert("RGB").convert("HSV"), np.float32) / 255
    return hsv, np.asarray(sprite.getchannel("A"), np.float32) / 255


def _dominant(sprite: Image.Image) -> tuple[float, float, np.ndarray]:
    """The commonest hue, the share of the drawing that has it, and to what degree each pixel has it (H, W)."""
    hsv, alpha = _hsv(sprite)
    vivid = np.clip((hsv[..., 1] - 0.2) / 0.15, 0, 1) * np.clip((hsv[..., 2] - 0.15) / 0.15, 0, 1)
    counts, _ = np.histogram(hsv[..., 0], 32, (0, 1), weights=vivid * alpha)
    smooth = counts + np.roll(counts, 1) + np.roll(counts, -1)
    hue = (int(smooth.argmax()) + 0.5) / 32
    distance = np.abs((hsv[..., 0] - hue + 0.5) % 1 - 0.5)
    has = vivid * np.clip((_NEAR - distance) / (0.3 * _NEAR), 0, 1)
    return hue, float((has * alpha).sum() / max(alpha.sum(), 1)), has


def recoloured(sprite: Image.Image, colour: str) -> Image.Image:
    """The sprite with everything of its commonest hue in another colour; shades within that hue stay."""
    hue, _, has = _dominant(sprite)
    hsv, alpha = _hsv(sprite)
    weight = has * alpha
    # A drawing without any hue keeps its colours: nothing of it is mixed in below.
    saturation, value = ((hsv[..., i] * weight).sum() / weight.sum() if weight.any() else 1.0 for i in (1, 2))
    target = (
        np.asarray(Image.new("RGB", (1, 1), tuple(min(255, level) for level in COLOURS[colour])).convert("HSV"), np.float32)[0, 0] / 255
    )
    shifted = hsv.copy()
    shifted[..., 0] = (target[0] + 0.3 * ((hsv[..., 0] - hue + 0.5) % 1 - 0.5)) % 1
    if colour in NEUTRAL:
        shifted[..., 1] = 0.06 * hsv[..., 1]
        shifted[..., 2] = target[2] * (1 - 0.55 * (1 - hsv[..., 2] / value)) if colour != "black" else 0.16 + 0.3 * (hsv[..., 2] - value)
    else:
        shifted[..., 1] = hsv[..., 1] * target[1] / saturation
        shifted[..., 2] = target[2] * (1 - 0.75 * (1 - hsv[..., 2] / value))
    changed = Image.fromarray((shifted.clip(0, 1) * 255).astype(np.uint8), "HSV").convert("RGB")
    mix = (np.asarray(changed) * has[..., None] + np.asarray(sprite.convert("RGB")) * (1 - has[..., None])).astype(np.uint8)
    return Image.merge("RGBA", [*Image.fromarray(mix).split(), sprite.getchannel("A")])
