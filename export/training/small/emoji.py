"""The captioned emoji pictures that train the small model: fetched, drawn, captioned and split.

Source: three permissively licensed drawings of every concept, fetched from npm by name and version. Every word of a caption is true,
because the picture is made from the caption's own facts. The recipe is seeded a picture: picture i depends on (seed, i) alone.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from snoopi_rt.errors import InputError, SnoopiError
from snoopi_rt.export.training.image_grid import image_grid
from snoopi_rt.export.training.small.concepts import CONCEPTS, Concept, with_article
from snoopi_rt.export.weights.arrays import new_array
from snoopi_rt.files import sha256, write_whole
from snoopi_rt.request import integer

SIZE = 128  # pixels a side
PROMPTS, NEGATIVES = "prompts.txt", "negatives.txt"

BACKGROUNDS = {
    "red": (214, 40, 44),
    "orange": (246, 140, 36),
    "yellow": (250, 216, 60),
    "green": (58, 166, 72),
    "blue": (48, 104, 218),
    "purple": (136, 68, 188),
    "pink": (250, 152, 198),
    "brown": (122, 80, 48),
    "black": (18, 18, 20),
    "white": (250, 250, 250),
    "gray": (142, 142, 146),
}
NEUTRAL = ("black", "white", "gray")  # the colour words that stay true in a grayscale picture
QUALITIES = ("blurry", "pixelated", "grayscale", "grainy")

# Finer grain is below what an autoencoder of factor 8 with 8 channels can carry; a cell of the latent's own size is carried exactly.
GRAIN, CELL = 4, 8  # pixels

FLAWED = 0.36  # share of pictures that carry one flaw
UNNAMED = 0.35  # share of flaws that the caption does not name: a plain prompt must sometimes show one
PAIRS = 0.15  # share of pictures with two things side by side: one of them can be a negative prompt
BARE = 0.08  # share of captions that are one attribute: a negative prompt is one, so the model must have met it
NO_BACKGROUND_WORD = 0.15
NO_STYLE_WORD = 0.5
ALIAS = 0.25
TEST_PERCENT = 5


@dataclass(frozen=True)
class Drawing:
    """One set of drawings of all concepts: an npm package, its style word and the licence of the art."""

    package: str
    version: str
    style: str
    licence: str
    upstream: str


DRAWINGS = (
    Drawing("@lobehub/fluent-emoji-3d", "1.1.0", "3d render", "MIT", "github.com/microsoft/fluentui-emoji, (c) Microsoft Corporation"),
    Drawing(
        "@iconify-json/fluent-emoji-flat", "1.2.6", "flat drawing", "MIT", "github.com/microsoft/fluentui-emoji, (c) Microsoft Corporation"
    ),
    Drawing("@iconify-json/noto", "1.2.9", "cartoon", "Apache-2.0", "github.com/googlefonts/noto-emoji, (c) Google LLC"),
)


@dataclass(frozen=True)
class Facts:
    """What is true of one picture. Names are those that the caption uses, concepts the usual ones; the second thing is on the right."""

    name: str
    concept: str
    style: str
    background: str
    quality: str | None
    second_name: str | None = None
    second: str | None = None


@dataclass(frozen=True)
class Row:
    """One line of captions.jsonl."""

    caption: str
    split: str  # "train" or "test"
    facts: Facts


def build(out: Path, count: int, seed: int) -> None:
    """Writes `count` captioned pictures to the folder `out`: pictures.npy (count, 128, 128, 3) uint8, captions.jsonl, prompts.txt,
    negatives.txt, image_grid.png, NOTICE.txt and, last, dataset.json.

    Raises InputError where `out` already holds a set, SnoopiError where npm is missing or fails.
    """
    integer("count", count, 1)
    integer("seed", seed, 0)
    if (out / "dataset.json").exists():
        raise InputError(f"{out} already holds a picture set; choose another folder")
    write_set(out, fetch_sprites(out / "npm"), count, seed)


def write_set(out: Path, sprites: dict[tuple[str, str], Image.Image], count: int, seed: int) -> None:
    """What `build` does once it has the sprites: RGBA pictures of 128 x 128 by (concept, style)."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = new_array(out / "pictures.npy", (count, SIZE, SIZE, 3), np.uint8)
    with open(out / "captions.jsonl", "w", encoding="utf-8") as lines:
        for i in tqdm(range(count), desc="pictures", unit="picture", mininterval=0.5):
            row, pictures[i] = compose(sprites, np.random.default_rng([seed, i]))
            lines.write(json.dumps(asdict(row)) + "\n")
    pictures.flush()
    rows = _read_rows(out)
    image_grid(pictures[:64], [row.caption for row in rows[:64]]).save(out / "image_grid.png")
    # What the student is distilled on: it never sees the compositions of the test split.
    write_whole(out / PROMPTS, "".join(f"{row.caption}\n" for row in rows if row.split == "train").encode())
    write_whole(out / NEGATIVES, "".join(f"{each}\n" for each in negatives()).encode())
    (out / "NOTICE.txt").write_text(
        "The pictures are made from:\n" + "".join(f"- {d.package} {d.version}: {d.licence}, {d.upstream}\n" for d in DRAWINGS),
        encoding="utf-8",
    )
    facts = {"kind": "emoji", "count": count, "seed": seed, "size": SIZE, "concepts": [c.name for c in CONCEPTS]}
    hashes = {name: sha256(out / name) for name in ("pictures.npy", "captions.jsonl")}
    write_whole(out / "dataset.json", (json.dumps({**facts, "sha256": hashes}, indent=1) + "\n").encode())


def negatives() -> list[str]:
    """What a student of these pictures learns negatives on: flaws, backgrounds and things, each group about as often as the others."""
    things = [with_article(concept.name) for concept in CONCEPTS]
    groups = [list(QUALITIES), [f"{with_article(colour)} background" for colour in BACKGROUNDS], things]
    return [each for group in groups for each in group * round(len(things) / len(group))]


def read_rows(folder: Path) -> list[Row]:
    """The captions of a set that `build` wrote, in the order of its pictures. Raises InputError where `folder` holds no whole set."""
    if not (folder / "dataset.json").exists():
        raise InputError(f"no picture set in {folder}: make one with snoopi-rt data emoji --out {folder}")
    return _read_rows(folder)


def _read_rows(folder: Path) -> list[Row]:
    with open(folder / "captions.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [Row(row["caption"], row["split"], Facts(**row["facts"])) for row in rows]


def open_pictures(folder: Path) -> np.ndarray:
    """The pictures (N, 128, 128, 3) uint8 of a set that `build` wrote, memory-mapped."""
    return np.load(folder / "pictures.npy", mmap_mode="r")


def split_of(name: str, background: str) -> str:
    """`test` for 5 % of the compositions (thing and background), by hash: the model never sees these together."""
    digest = hashlib.sha256(f"{name} {background}".encode()).hexdigest()
    return "test" if int(digest, 16) % 100 < TEST_PERCENT else "train"


def compose(sprites: dict[tuple[str, str], Image.Image], rng: np.random.Generator, split: str | None = None) -> tuple[Row, np.ndarray]:
    """One captioned picture (128, 128, 3) uint8, drawn from `rng` alone; of one split where that is given."""
    row = _row(rng)
    while split not in (None, row.split):
        row = _row(rng)
    facts = row.facts
    return row, draw([sprites[thing, facts.style] for thing in (facts.concept, facts.second) if thing], facts, rng)


def _row(rng: np.random.Generator) -> Row:
    concept, second = (CONCEPTS[i] for i in rng.choice(len(CONCEPTS), 2, replace=False))
    style = DRAWINGS[rng.integers(len(DRAWINGS))].style
    background = list(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
    quality = QUALITIES[rng.integers(len(QUALITIES))] if rng.random() < FLAWED else None
    facts = Facts(_name(concept, rng), concept.name, style, background, quality)
    if rng.random() < PAIRS:
        facts = replace(facts, second_name=_name(second, rng), second=second.name)
    caption = _bare_caption(facts, rng) if rng.random() < BARE else _caption(facts, rng)
    unseen = any(split_of(thing, background) == "test" for thing in (facts.concept, facts.second) if thing)
    return Row(caption, "test" if unseen else "train", facts)


def draw(things: list[Image.Image], facts: Facts, rng: np.random.Generator) -> np.ndarray:
    """The picture (128, 128, 3) uint8: one sprite near the middle of its background, or two side by side, then the flaw."""
    shade = np.clip(np.array(BACKGROUNDS[facts.background]) + rng.integers(-6, 7, 3), 0, 255)
    picture = Image.new("RGB", (SIZE, SIZE), tuple(int(c) for c in shade))
    for number, sprite in enumerate(things):
        side = int(rng.integers(100, 109)) if len(things) == 1 else int(rng.integers(54, 59))
        middle = SIZE * (2 * number + 1) // (2 * len(things)), SIZE // 2
        x, y = (int(place - side // 2 + shift) for place, shift in zip(middle, rng.integers(-3, 4, 2), strict=True))
        small = sprite.resize((side, side), Image.Resampling.LANCZOS)
        picture.paste(small, (x, y), small)
    return np.asarray(degrade(picture, facts.quality, rng))


def degrade(picture: Image.Image, quality: str | None, rng: np.random.Generator) -> Image.Image:
    """The picture with the flaw that `quality` names; None leaves it clean."""
    if quality == "blurry":
        return picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(3.0, 4.5))))
    if quality == "pixelated":
        return picture.resize((SIZE // CELL, SIZE // CELL), Image.Resampling.BOX).resize(picture.size, Image.Resampling.NEAREST)
    if quality == "grayscale":
        return picture.convert("L").convert("RGB")
    if quality == "grainy":
        cells = SIZE // GRAIN
        grain = rng.normal(0.0, rng.uniform(26, 36), (cells, cells, 1)).repeat(GRAIN, 0).repeat(GRAIN, 1)
        return Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8))
    return picture


def _name(concept: Concept, rng: np.random.Generator) -> str:
    return concept.aliases[rng.integers(len(concept.aliases))] if concept.aliases and rng.random() < ALIAS else concept.name


def _caption(facts: Facts, rng: np.random.Generator) -> str:
    named = facts.quality if facts.quality and rng.random() >= UNNAMED else None
    colour = None if rng.random() < NO_BACKGROUND_WORD else _true_colour(facts)
    style = None if rng.random() < NO_STYLE_WORD else facts.style
    place = int(rng.integers(3)) if named else -1  # before the thing, after the caption, or "a blurry picture of"
    if place == 0 and facts.second_name:
        place = 2  # "a blurry cat and a dog" would leave the dog sharp
    caption = f"a {named} {facts.name}" if place == 0 else with_article(facts.name)
    if facts.second_name:
        caption += f" and {with_article(facts.second_name)}"
    if style:
        caption = f"a {style} of {caption}"
    elif place == 2:
        caption = f"a {named} picture of {caption}"
    if colour:
        caption += f" on {with_article(colour)} background"
    return f"{caption}, {named}" if place == 1 or (place == 2 and style) else caption


def _bare_caption(facts: Facts, rng: np.random.Generator) -> str:
    colour = _true_colour(facts)
    said = [f"{with_article(colour)} background"] if colour else []
    said += [facts.style] if not facts.quality else []
    # A flaw is said twice as often as the rest, in the forms that a negative prompt takes.
    said += [facts.quality, f"a {facts.quality} picture"] if facts.quality else []
    return said[rng.integers(len(said))] if said else facts.name


def _true_colour(facts: Facts) -> str | None:
    return None if facts.quality == "grayscale" and facts.background not in NEUTRAL else facts.background


def fetch_sprites(folder: Path, drawings: tuple[Drawing, ...] = DRAWINGS, share: float = 1.0) -> dict[tuple[str, str], Image.Image]:
    """RGBA sprites of 128 x 128 by (concept, style), fetched with npm into `folder`.

    Raises SnoopiError where npm is missing or fails, and where fewer than `share` of the drawings have some concept.
    """
    noto = _fetch(DRAWINGS[2], folder)
    code_points = {icon: code for code, icon in json.loads((noto / "chars.json").read_text(encoding="utf-8")).items()}
    codes = {concept.name: code_points[concept.emoji] for concept in CONCEPTS}
    found = {}
    for drawing in tqdm(drawings, desc="drawings", unit="package"):
        for name, image in _read_drawing(_fetch(drawing, folder), codes):
            found[name, drawing.style] = image
    have = {concept.name: sum((concept.name, drawing.style) in found for drawing in drawings) for concept in CONCEPTS}
    if missing := [name for name, count in have.items() if count < share * len(drawings)]:
        raise SnoopiError(f"drawings without these concepts: {', '.join(missing)}")
    return found


def _read_drawing(root: Path, codes: dict[str, str]) -> Iterator[tuple[str, Image.Image]]:
    if (root / "assets").is_dir():  # rendered pictures, named by code point with or without the emoji variation selector
        files = {file.stem.replace("-fe0f", ""): file for file in (root / "assets").iterdir()}
        for name, code in codes.items():
            if code in files:
                yield name, Image.open(files[code]).convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
        return
    import resvg_py

    icons = json.loads((root / "icons.json").read_text(encoding="utf-8"))
    names = json.loads((root / "chars.json").read_text(encoding="utf-8"))
    emoji = {concept.name: concept.emoji for concept in CONCEPTS}
    for name, code in codes.items():
        # Some sets have no code points, and the same names as Noto's.
        icon = icons["icons"].get(names.get(code, emoji[name]))
        if icon is None:
            continue
        box = f"0 0 {icon.get('width', icons['width'])} {icon.get('height', icons['height'])}"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True))
        yield name, Image.open(io.BytesIO(png)).convert("RGBA").resize((SIZE, SIZE))


def _fetch(drawing: Drawing, folder: Path) -> Path:
    """The unpacked npm package, fetched once."""
    root = folder / f"{drawing.package.replace('/', '-').lstrip('@')}-{drawing.version}"
    if root.exists():
        return root
    npm = shutil.which("npm")
    if npm is None:
        raise SnoopiError("the emoji pictures come from npm packages, and npm is not installed: install Node.js (https://nodejs.org)")
    folder.mkdir(parents=True, exist_ok=True)
    # A folder of its own, since others may fetch the same package now.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as beside:
        done = subprocess.run(
            [npm, "pack", f"{drawing.package}@{drawing.version}", "--silent", "--no-update-notifier", "--logs-max=0"],
            cwd=beside,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        if done.returncode:
            reason = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[0]
            raise SnoopiError(f"npm pack {drawing.package}@{drawing.version} failed: {reason}")
        with tarfile.open(Path(beside) / done.stdout.split()[-1]) as archive:
            archive.extractall(beside, filter="data")
        with contextlib.suppress(OSError):  # another was first
            os.replace(Path(beside) / "package", root)
    return root
