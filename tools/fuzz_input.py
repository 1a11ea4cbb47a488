"""Prompt files, images and options of the command line: the kinds of inputs of `fuzz.py` that users give."""

import csv
import io
import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import tiny_bundle
from fuzz_kinds import LONGEST, PICTURE, REFUSED, Finding, Kind, pixels, refused, require_picture
from mutations import ODD, TEXTS, damaged_bytes, damaged_json, damaged_png

from snoopi_rt import image
from snoopi_rt.batch.runner import Batch
from snoopi_rt.errors import SnoopiError
from snoopi_rt.loading import load
from snoopi_rt.pipeline import Pipeline


class Rows(Kind):
    """Files of prompts in every format, drawn into a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.pipe = load(self.bundle.folder, "cpu")

    def judge(self, random: Random) -> str:
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        path = self.folder / f"rows.{random.choice(('txt', 'csv', 'tsv', 'json', 'jsonl', 'parquet'))}"
        path.write_bytes(self._file(random, path.suffix[1:]))
        try:
            Batch(path, out, seed=3).run(self.pipe)
        except SnoopiError as error:
            return refused(error, 2)
        drawn = require_right_rows(self.pipe, out)
        return PICTURE if drawn else REFUSED

    def _file(self, random: Random, kind: str) -> bytes:
        rows = [self._row(random) for _ in range(random.randint(1, 6))]
        odd = random.random() < 0.5
        if kind == "json":
            return damaged_json(random, rows) if odd else damaged_bytes(random, json.dumps(rows, indent=1).encode())
        if kind == "jsonl":
            lines = [damaged_json(random, row) if odd and random.random() < 0.5 else json.dumps(row).encode() for row in rows]
            return damaged_bytes(random, b"\n".join(lines)) if random.random() < 0.5 else b"\n".join(lines)
        if kind == "parquet":
            return self._parquet(random, rows, odd)
        if odd:
            random.choice(rows)[random.choice(("prompt", "seed", "negative_scale", "negative_prompt"))] = random.choice(ODD)
        if kind == "txt":
            text = "\n".join(str(row["prompt"]) for row in rows)
        else:
            written = io.StringIO(newline="")
            names = ["prompt", "negative_prompt", "negative_scale", "seed"]
            names = random.sample(names, 4) if random.random() < 0.9 else [*names, random.choice(("seed", "", "x", "Unnamed: 0"))]
            mark = "\t" if kind == "tsv" else random.choice(",,,;\t")
            table = csv.writer(written, delimiter=mark, lineterminator=random.choice(("\n", "\r\n")))
            table.writerow(names)
            table.writerows([[row.get(name, "") if row.get(name) is not None else "" for name in names] for row in rows])
            text = written.getvalue()
        data = text.encode(random.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1")), "replace")
        return data if odd and random.random() < 0.7 else damaged_bytes(random, data)

    def _row(self, random: Random) -> dict[str, Any]:
        row: dict[str, Any] = {"prompt": " ".join(random.choices(tiny_bundle.WORDS[3:], k=random.randint(1, 5)))}
        if random.random() < 0.5:
            row |= {"negative_prompt": random.choice(("blurry", "warm blue", "")), "negative_scale": random.choice((0, 0.5, 1, None))}
        return row | ({"seed": random.randrange(2**32)} if random.random() < 0.5 else {})

    def _parquet(self, random: Random, rows: list[dict[str, Any]], odd: bool) -> bytes:
        import pyarrow
        from pyarrow import parquet

        columns: dict[str, Any] = {
            name: [row.get(name) for row in rows] for name in ("prompt", "negative_prompt", "negative_scale", "seed")
        }
        if odd:
            name = random.choice(list(columns))
            values = ([b"x"], [[1]], [{"a": 1}], [None], [1.5], [2**63], [True], ["x" * 9999])
            columns[name] = random.choice(values) * len(rows)
        try:
            table = pyarrow.table(columns)
        except (pyarrow.ArrowException, OverflowError, TypeError, ValueError):
            table = pyarrow.table({"prompt": [row["prompt"] for row in rows]})
        file = io.BytesIO()
        parquet.write_table(table, file, compression=random.choice(("snappy", "none", "zstd")))
        return file.getvalue() if odd and random.random() < 0.5 else damaged_bytes(random, file.getvalue())


def require_right_rows(pipe: Pipeline, out: Path) -> int:
    """How many images the index of a batch lists; each is what its line asks for. Raises Finding."""
    drawn, listed = 0, set()
    for line in (out / "index.jsonl").read_bytes().splitlines()[1:]:
        record = json.loads(line)
        if record["row"] in listed:
            raise Finding(f"row {record['row']} is listed twice")
        listed.add(record["row"])
        if "file" not in record:
            if not record["error"].strip() or len(record["error"].splitlines()) > 1 or len(record["error"]) > LONGEST:
                raise Finding(f"no clear line for a row: {record['error'][:200]!r}")
            continue
        names = ("prompt", "negative_prompt", "negative_scale", "seed")
        result = pipe.generate(**{name: record[name] for name in names if name in record})
        require_picture(pixels(out / record["file"]), result.images[0], f"row {record['row']}")
        drawn += 1
    if listed != set(range(1, len(listed) + 1)):
        raise Finding(f"rows {sorted(listed)[:9]} are listed, and others not")
    return drawn


class Images(Kind):
    """Images of ours and of others: what `info` says of them, and whether a batch that finds one in its folder continues."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.pipe = load(self.bundle.folder, "cpu")
        result = self.pipe.generate("a red fox", "blurry", 0.5, seed=3)
        self.metadata, self.picture = result.metadata(0), result.images[0]
        self.files = {name: image.encode(self.picture, kind, self.metadata) for name, kind in image.FORMATS.items()}
        self.rows = folder / "rows.csv"
        self.rows.write_text("prompt,negative_prompt,negative_scale\na red fox,blurry,0.5\na blue cat,,\n", encoding="utf-8")

    def judge(self, random: Random) -> str:
        ending = random.choice(list(image.FORMATS))
        path = self.folder / f"picture{ending}"
        path.write_bytes(self._file(random, ending))
        try:
            command = image.command(image.read_metadata(path), None)
            shlex.split(command)
        except SnoopiError as error:
            refused(error, 2)
        else:
            if len(command.splitlines()) > 1:
                raise Finding(f"a command of several lines: {command[:200]!r}")
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        format = ending[1:]
        shutil.copyfile(path, out / f"000001.{format}")
        outcome = Batch(self.rows, out, seed=3, format=format).run(self.pipe)
        if outcome.drawn + outcome.kept + outcome.failed != 2 or outcome.kept + outcome.drawn < 1:
            raise Finding(f"a batch of two rows beside a damaged image: {outcome}")
        if outcome.drawn == 2 and format == "png":
            require_picture(pixels(out / "000001.png"), self.picture, "a damaged image that was drawn again")
        return PICTURE if outcome.failed == 0 else REFUSED

    def _file(self, random: Random, ending: str) -> bytes:
        data = self.files[ending]
        if random.random() < 0.3:
            return damaged_bytes(random, data)
        if ending == ".png":
            return damaged_png(random, data)
        from PIL import Image

        exif = Image.Exif()
        text: Any = damaged_json(random, self.metadata).decode(errors="replace")
        exif[image.DESCRIPTION] = random.choice((text, text, text.encode(), 7, ""))
        if random.random() < 0.5:
            exif[random.choice((0x8769, 0x8825, 0xA005, 0x010F, 0x9286))] = random.choice((1, 2**32 - 1, "x", b"\xff\xfe"))
        file = io.BytesIO()
        try:
            Image.fromarray(self.picture).save(file, image.FORMATS[ending], exif=exif)
        except Exception:  # Pillow does not write everything that it reads
            return damaged_bytes(random, data)
        return damaged_bytes(random, file.getvalue()) if random.random() < 0.3 else file.getvalue()


class Options(Kind):
    """The words of `snoopi-rt generate`, through the command line itself."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.pipe = load(self.bundle.folder, "cpu")
        os.chdir(folder)

    def judge(self, random: Random) -> str:
        from click.testing import CliRunner

        from snoopi_rt.cli.main import main

        words = self._words(random)
        result = CliRunner().invoke(main, ["generate", "--bundle", str(self.bundle.folder), *words])
        try:
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                raise Finding(f"{type(result.exception).__name__}: {str(result.exception)[:150]} of {words!r:.300}")
            errors = [line for line in result.stderr.splitlines() if line.startswith(("error: ", "Error: "))]
            if result.exit_code:
                if (
                    result.exit_code not in (1, 2)
                    or len(errors) != 1
                    or len(errors[0]) > LONGEST
                    or result.stderr.splitlines()[-1] != errors[0]
                ):
                    raise Finding(f"exit code {result.exit_code} and {result.stderr[-300:]!r} of {words!r:.300}")
                return REFUSED
            for path in self.folder.glob("out*/*.png"):
                made = image.read_metadata(path)
                if "side_by_side" in made:
                    continue
                scale = float(made["negative_scale"]) if "negative_scale" in made else None
                width, _, height = made["size"].partition("x")
                asked = {"size": (int(height), int(width)), "seed": int(made["seed"]), "truncate": "truncate" in made}
                drawn = self.pipe.generate(made["prompt"], made.get("negative_prompt"), scale, **asked)
                difference = np.abs(pixels(path).astype(int) - drawn.images[0]).max()
                if difference > (1 if made["engine"] != "cpu" else 0):
                    raise Finding(f"a wrong picture of {words!r:.300}")
            return PICTURE
        finally:
            for path in self.folder.glob("out*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _words(self, random: Random) -> list[str]:
        def odd(*usual: str) -> str:
            value = random.choice((*TEXTS, *ODD)) if random.random() < 0.3 else random.choice(usual)
            text = value if isinstance(value, str) else "1" * 400 if value == 10**400 else str(value)
            return (
                text.replace("\0", "").encode(errors="surrogateescape").decode(errors="surrogateescape")
                if "\ud800" not in text
                else "\udcff"
            )

        options = {
            "--neg": lambda: odd("blurry", "warm", ""),
            "--neg-scale": lambda: odd("0", "0.5", "1", "0,0.5,1", "2", ",", "0,0"),
            "--seed": lambda: odd("0", "7", "4294967295", "-1", "7.0"),
            "-n": lambda: random.choice(("1", "2", "3", "0", "-1", "99999999999999999999", "x", "1.5")),
            "--format": lambda: odd("png", "jpg", "WEBP"),
            "--size": lambda: odd("16x16", "24x16", "16x17", "x", "0x0"),
            "--engine": lambda: odd("auto", "cpu", "openvino", "cuda"),
            "--precision": lambda: odd("fp32", "generator=fp32", "decoder=fp16", "=", ",,"),
            "--threads": lambda: odd("1", "2", "0", "-3"),
            "-o": lambda: random.choice(("out/", "out/a.png", "out/a", "out/b.jpg", "out/" + "x" * 300, "out/.png", "out/\n.png", "-")),
        }
        words = [*("-o", "out/")]
        for name in random.sample(list(options), random.randint(0, 5)):
            words += [name, options[name]()]
        words += [word for word in ("--side-by-side", "--json", "--truncate", "--force", "--wrong") if random.random() < 0.1]
        return [*words, "--", odd("a red fox", "blue cat", "a a a a a a a", "A RED fox")]
