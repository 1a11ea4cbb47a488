"""Whether a long-lived pipeline's memory stays flat: images of ever new prompts and negatives of every length, in batches of every size.

python tools/memory.py --images 10000 --out docs/memory.json
"""

import json
import os
import tempfile
from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

WORDS = ("a", "red", "blue", "panda", "fox", "rocket", "on", "the", "background", "and", "blurry", "grainy", "flat", "drawing", "render")


@click.command()
@click.option("--images", default=10_000)
@click.option("--bundle", type=click.Path(path_type=Path), help="[default: the embedded]")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(images: int, bundle: Path | None, out: Path) -> None:
    """Print and write the resident memory in MB after each tenth of the images."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SNOOPI_RT_CACHE"] = cache  # the prompts are nobody's
        import snoopi_rt

        random, rows, drawn = np.random.default_rng(0), [], 0
        with snoopi_rt.load(bundle) as pipe, tqdm(total=images, unit="image") as bar:
            pipe.warmup()
            rows.append({"images": 0, "megabytes": resident()})
            while drawn < images:
                count = min(int(random.integers(1, 9)), images - drawn)
                negative = prompt(random) if random.random() < 0.7 else None
                pipe.generate([prompt(random) for _ in range(count)], negative, seed=list(range(drawn, drawn + count)), truncate=True)
                drawn += count
                bar.update(count)
                if drawn >= len(rows) * images / 10:
                    rows.append({"images": drawn, "megabytes": resident()})
    for row in rows:
        click.echo(f"{row['images']:8} images  {row['megabytes']:7.1f} MB")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")


def prompt(random: np.random.Generator) -> str:
    """One to 24 words."""
    return " ".join(random.choice(WORDS, random.integers(1, 25)))


def resident() -> float:
    """This process's resident memory."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    main()
