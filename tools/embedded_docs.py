"""Writes the figures and the images of the embedded model into README.md and docs/, from one evaluation of it.

    snoopi-rt eval small --teacher weights/small/teacher --out out/evaluation
    snoopi-rt bench --engine cpu --engine openvino --runs 100 | tail -n 1 > out/bench.json
    python tools/embedded_docs.py --evaluation out/evaluation --bench out/bench.json

Needs chromium and playwright for the screenshot of the web page. Without options only the tables are written again, from
docs/evaluation.json and docs/bench.json; a figure that is not there is TODO-FIGURE.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np
from PIL import Image

import snoopi_rt
from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.bundle.variant import meaning
from snoopi_rt.pipeline import EMBEDDED

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EVALUATION, BENCH = DOCS / "evaluation.json", DOCS / "bench.json"
PAGES = (ROOT / "README.md", DOCS / "model-card.md", DOCS / "benchmarks.md")
TABLE = re.compile(r"(<!-- figures: (\w+) -->\n).*?(?=<!-- end -->)", re.S)
SPEED = re.compile(r"(?<=\| embedded, 256 x 256, ONNX Runtime \| )\S+")
MISSING = "TODO-FIGURE"

# What stands in the pages: a label, then the section and the name of a measure of `eval small`.
RECOGNISED = ("recognition", "top 5, common things")
REMOVAL = "negatives of what was asked for"
SHORT = {
    "common things recognised, top 5": RECOGNISED,
    "coloured things": ("attributes", "coloured thing"),
    "both of two things recognised": ("attributes", "both of two things"),
    "blurry: gone with `--neg blurry`": (REMOVAL, "blurry: gone"),
    "a background: gone": (REMOVAL, "background: gone"),
    "one of two things: gone": (REMOVAL, "one of two: gone"),
    "... the other recognised": (REMOVAL, "one of two: the other recognised, of those gone"),
}
DRAWN = {
    "a common thing, the judge's first guess": ("recognition", "top 1, common things"),
    "a common thing, among its first five": RECOGNISED,
    "any thing, the judge's first guess": ("recognition", "top 1, all things"),
    "any thing, among its first five": ("recognition", "top 5, all things"),
    "things recognised in at least one of four seeds": ("recognition", "things whose drawing is in the top 5, in one of 4 seeds"),
    "one to three of a thing": ("attributes", "number of things, one to three"),
    "a thing in a colour": ("attributes", "coloured thing"),
    "both of two things": ("attributes", "both of two things"),
    "white background where none is named": ("natural prompts", "white background where none is named"),
    **{
        f"natural prompts: {name}": ("natural prompts", name)
        for name in (
            "one thing, top 5",
            "background that is named",
            "number of things",
            "coloured thing",
            "both of two things",
            "flaw that is named",
        )
    },
    "fine detail, relative to real images'": ("sharpness", "fine-detail energy"),
    "Frechet distance, relative to the teacher's": ("sharpness", "Frechet distance"),
}
ONLY_STUDENT = ("sharpness", "Frechet distance")
_SHOWN = "shown when asked for"
REMOVED = {
    **dict.fromkeys(("blurry", "pixelated", "grayscale", "grainy", "background"), _SHOWN),
    "one of two": f"both {_SHOWN}",
    "colour of a thing": _SHOWN,
}
HARMLESS = "clean pictures under negatives"
CHANGED = {
    "change of the thing": "mean change of the thing, levels of 255",
    "recognition gained": "recognition gained, points",
    "Frechet distance": "Frechet distance, relative to no negative prompt",
}
CLEAN = ("blurry", "pixelated", "grayscale", "grainy", "generic list", "a bicycle", "absent colour")
BENCHED = {"an image": "plain", "an image with a negative prompt": "negative"}
"""What `bench` times on a quiet machine; an evaluation times fewer images, after minutes of work."""
COST = {
    "from the start of the process to the PNG, with an empty cache": ("cost", "from start to PNG, with an empty cache"),
    "from the start of the process to the PNG": ("cost", "from start to PNG"),
    "peak memory": ("cost", "peak memory"),
    "size of the bundle": ("cost", "bundle"),
}
MEASURES = {
    *SHORT.values(),
    *DRAWN.values(),
    *COST.values(),
    *((REMOVAL, f"{name}: {what}") for name, shown in REMOVED.items() for what in (shown, "gone")),
    *((HARMLESS, f"{name}, {what}") for name in CLEAN for what in CHANGED),
}
"""All of them."""
SHEETS = {"natural": "samples", "things": "things", "clean": "clean", "teacher_student": "teacher_student"}
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
REMOVALS = {
    "a blurry panda on an orange background": "blurry",
    "a pixelated hamburger": "pixelated",
    "a grayscale rose": "grayscale",
    "a cat and a dog": "a dog",
    "a fox on a blue background": "blue background",
}
SEED = 1
HISTORY = ("a blurry owl on a purple background", "a blurry rocket on a blue background", "a blurry fox on a green background")


class Figures:
    """The rows of docs/evaluation.json, and docs/bench.json, as cells of tables."""

    def __init__(self) -> None:
        document = json.loads(EVALUATION.read_text(encoding="utf-8")) if EVALUATION.exists() else None
        self._rows = document and {who: {(row["section"], row["name"]): row for row in rows} for who, rows in document["judged"].items()}
        self._bench = json.loads(BENCH.read_text(encoding="utf-8")) if BENCH.exists() else None

    def __call__(self, who: str, measure: tuple[str, str], interval: bool = False) -> str:
        """A share in percent, any other figure in its unit; empty where it is not measured of the teacher."""
        if self._rows is None:
            return MISSING
        row = self._rows.get(who, {}).get(measure)
        if row is None or row.get("value") is None:
            return "" if who == "teacher" else "not measured"
        low, high = row.get("interval") or (None, None)
        if row["unit"] == "share":
            ends = f" ({100 * low:.0f} to {100 * high:.0f})" if interval and low is not None else ""
            return f"{100 * row['value']:.0f} %{ends}"
        ends = f" ({low:.2g} to {high:.2g})" if interval and low is not None else ""
        unit = f" {row['unit']}" if row["section"] == "cost" else ""
        return f"{row['value']:.3g}{unit}{ends}"

    @property
    def seconds(self) -> str:
        """Of an image with a negative prompt."""
        return MISSING if self._bench is None else f"{self.image('negative'):.3f}"

    def image(self, way: str) -> float:
        """Median seconds of an image on ONNX Runtime, "plain" or "negative"; NaN if they were not measured."""
        return float("nan") if self._bench is None else self._bench["engines"]["cpu"][way]["total"]["p50"]

    def engines(self) -> Iterator[list[str]]:
        """The rows of the table of engines."""
        if self._bench is None:
            yield from ([engine, *[MISSING] * 7] for engine in ("cpu", "openvino"))
            return
        for engine, result in self._bench["engines"].items():
            plain = {stage: f"{1000 * seconds['p50']:.1f}" for stage, seconds in result["plain"].items()}
            start, memory = result["cold_start"], result["cold_start"]["peak_memory"]
            yield [
                f"{engine} ({'; '.join(meaning(name, engine) for name in sorted(set(result['precision'].values())))})",
                *(plain[stage] for stage in ("text_encoder", "generator", "decoder", "total")),
                f"{1000 * result['negative']['total']['p50']:.1f}",
                f"{start['first']:.2f} s / {start['again']:.2f} s",
                "" if memory is None else f"{memory / 2**20:.0f} MiB",
            ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown, with an empty line before and after it."""
    lines = ["|".join(f" {cell} " if cell else " " for cell in line) for line in (header, *rows)]
    lines.insert(1, "|".join(["---"] * len(header)))
    return "\n".join(["", *(f"|{line}|" for line in lines), "", ""])


def tables(figures: Figures) -> dict[str, str]:
    """The tables by the names that stand in the pages."""

    who, negative = ["student, one call", "teacher, 10 steps"], ["negative prompt", "shown when asked for", "gone under it"]
    drawn = [
        [label, figures("embedded", measure, True), "" if measure == ONLY_STUDENT else figures("teacher", measure, True)]
        for label, measure in DRAWN.items()
    ]
    removed = [
        [name, figures("embedded", (REMOVAL, f"{name}: {shown}"), True), figures("embedded", (REMOVAL, f"{name}: gone"), True)]
        for name, shown in REMOVED.items()
    ]
    harmless = [[name, *(figures("embedded", (HARMLESS, f"{name}, {what}"), True) for what in CHANGED)] for name in CLEAN]
    benched = [[f"{label} (`bench`)", f"{1000 * figures.image(way):.1f} ms"] for label, way in BENCHED.items()]
    engines = ["engine", "text encoder", "generator", "decoder", "total", "with a negative prompt", "process start to PNG, first / again"]
    return {
        "short": table(["asked for", "share"], [[label, figures("embedded", measure)] for label, measure in SHORT.items()]),
        "drawn": table(["shown when asked for", *who], drawn),
        "removed": table(negative, removed),
        "clean": table(["negative prompt", *CHANGED.values()], harmless),
        "cost": table(
            ["cost", "two cores, ONNX Runtime"], [*benched, *([label, figures("embedded", measure)] for label, measure in COST.items())]
        ),
        "engines": table([*engines, "peak memory"], list(figures.engines())),
    }


def pages() -> dict[Path, str]:
    """The pages with the figures of today's docs/evaluation.json and docs/bench.json."""
    figures = Figures()
    made = tables(figures)
    texts = {path: path.read_text(encoding="utf-8") for path in PAGES}
    return {path: SPEED.sub(figures.seconds, TABLE.sub(lambda mark: mark[1] + made[mark[2]], text)) for path, text in texts.items()}


def take_evaluation(folder: Path, bundle: str) -> None:
    """Copies figures, plot and sheets of a whole evaluation of the bundle with that hash. Raises click.ClickException for another."""
    document = json.loads((folder / "small.json").read_text(encoding="utf-8"))
    embedded = document["who"].get("embedded", {})
    if embedded.get("hash") != bundle:
        raise click.ClickException(f"{folder} is no evaluation of the embedded bundle as it is")
    if embedded["engine"] != "cpu":  # `auto` takes what `bench` found fastest, and the pages speak of ONNX Runtime
        raise click.ClickException(f"{folder} was measured on {embedded['engine']}; evaluate before `bench`, or with an empty cache")
    if document["extent"]["things"] is not None:
        raise click.ClickException(f"{folder} is a quick evaluation, whose figures mean nothing")
    shutil.copyfile(folder / "small.json", EVALUATION)
    shutil.copyfile(folder / "small.png", DOCS / "evaluation.png")
    for sheet, name in SHEETS.items():
        if (folder / f"{sheet}.png").exists():
            _save(Image.open(folder / f"{sheet}.png"), name)


def draw_first_command() -> None:
    """Runs the README's first command, whose picture the README begins with."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^snoopi-rt (generate .* -o panda\.png --force)$", text, re.M)
    subprocess.run([sys.executable, "-m", "snoopi_rt", *shlex.split(line)], cwd=DOCS, check=True)


def draw_scales() -> None:
    """Draws docs/negative_scale.jpg: one seed of each prompt while the scale of its negative prompt rises."""
    from snoopi_rt.export.training.image_grid import image_grid

    with snoopi_rt.load() as pipe:
        rows = [pipe.generate([prompt] * len(SCALES), negative, list(SCALES), SEED).images for prompt, negative in REMOVALS.items()]
    labels = [f"{prompt} --neg {shlex.quote(negative)} --neg-scale {scale:g}" for prompt, negative in REMOVALS.items() for scale in SCALES]
    _save(image_grid(np.concatenate(rows), labels, len(SCALES)), "negative_scale")


def photograph_page() -> None:
    """Takes docs/page.png of the web page after four drawings."""
    from load import PORT, wait  # beside this file
    from playwright.sync_api import expect, sync_playwright

    server = subprocess.Popen([sys.executable, "-m", "snoopi_rt", "serve", "--port", str(PORT)], stderr=subprocess.DEVNULL)
    try:
        wait(server)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1040, "height": 800})
            page.goto(f"http://127.0.0.1:{PORT}")
            expect(page.locator("#status")).to_contain_text("images in")
            prompts = [*HISTORY, next(iter(REMOVALS))]
            for number, prompt in enumerate(prompts, 1):
                page.evaluate("document.getElementById('settings').open = true")
                page.fill("#seed", str(SEED))
                page.fill("#prompt", prompt)
                page.click("#draw")
                expect(page.locator("#history button")).to_have_count(number)
            page.evaluate("document.getElementById('settings').open = false")
            page.screenshot(path=DOCS / "page.png", full_page=True)
            browser.close()
    finally:
        server.terminate()
        server.wait()


def _save(picture: Image.Image, name: str) -> None:
    # Sheets of 256 x 256 pictures take several MB as PNG. Colours at full resolution: edges on plain backgrounds would bleed.
    picture.convert("RGB").save(DOCS / f"{name}.jpg", quality=90, subsampling=0, optimize=True)


@click.command()
@click.option("--evaluation", type=click.Path(path_type=Path, exists=True), help="What `snoopi-rt eval small --teacher ...` wrote.")
@click.option("--bench", type=click.Path(path_type=Path, exists=True), help="The last line of `snoopi-rt bench`.")
def main(evaluation: Path | None, bench: Path | None) -> None:
    """Write the figures, and with --evaluation also the pictures."""
    embedded = Bundle.load(EMBEDDED).hash
    if bench is not None:
        if json.loads(bench.read_text(encoding="utf-8"))["hash"] != embedded:
            raise click.ClickException(f"{bench} is of another bundle than the embedded one as it is")
        BENCH.write_bytes(bench.read_bytes())  # `bench` may be that file itself
    if evaluation is not None:
        take_evaluation(evaluation, embedded)
        draw_first_command()
        draw_scales()
        photograph_page()
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
