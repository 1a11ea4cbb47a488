"""What a negative prompt costs: a bundle's generator against the same student's without guidance, in interleaved pairs.

Both bundles are exported from the same weights, one with --guidance none. python tools/negative_cost.py --guided A --plain B --tokens 20
"""

import json
import statistics
import time
from pathlib import Path

import click
import numpy as np

from snoopi_rt.bundle.bundle import Bundle, Variant
from snoopi_rt.cache import Cache
from snoopi_rt.engines import load_engine
from snoopi_rt.engines.base import Engine


@click.command()
@click.option("--guided", type=click.Path(path_type=Path), required=True, help="A bundle with guidance.")
@click.option("--plain", type=click.Path(path_type=Path), required=True, help="One of the same weights without.")
@click.option("--tokens", type=int, multiple=True, default=[20], help="Of the negative prompt; may be given several times.")
@click.option("--prompt-tokens", default=20)
@click.option("--engine", default="openvino")
@click.option("--precision", help="Of the generators.  [default: each bundle's first]")
@click.option("--pairs", default=15)
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the JSON.")
def main(
    guided: Path, plain: Path, tokens: tuple[int, ...], prompt_tokens: int, engine: str, precision: str | None, pairs: int, out: Path | None
) -> None:
    """Print the median of the pairs' ratios."""
    builds = {name: Bundle.load(folder).variant("generator", engine, precision) for name, folder in (("guided", guided), ("plain", plain))}
    if len({build.precision for build in builds.values()}) > 1:
        raise click.UsageError(
            f"the bundles' precisions differ: {', '.join(build.precision for build in builds.values())}: say --precision"
        )
    engines = {name: opened(folder, engine, builds[name]) for name, folder in (("guided", guided), ("plain", plain))}
    document = {"engine": engine, "precision": builds["guided"].precision, "pairs": pairs, "prompt_tokens": prompt_tokens, "rows": []}
    base = feeds(engines["guided"], prompt_tokens, 1, 0.0)
    cases = {"no negative": base, **{f"{count} tokens": feeds(engines["guided"], prompt_tokens, count, 0.5) for count in tokens}}
    for name, case in cases.items():
        taken: list[tuple[float, float]] = []
        for number in range(pairs + 2):
            first = seconds(engines["plain"], case)
            second = seconds(engines["guided"], case)
            if number >= 2:
                taken.append((first, second))
        ratios = [second / first for first, second in taken]
        row = {
            "negative": name,
            "plain": statistics.median(first for first, _ in taken),
            "guided": statistics.median(second for _, second in taken),
            "extra": statistics.median(ratios) - 1,
        }
        document["rows"].append(row)
        click.echo(f"{name:16}{row['plain']:9.3f} s{row['guided']:9.3f} s{100 * row['extra']:+8.2f} %")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def opened(folder: Path, engine: str, build: Variant) -> Engine:
    """The generator of a bundle."""
    return load_engine(engine, folder / build.files[0].path, build.precision, cache=Cache(), key=build.hash)


def feeds(generator: Engine, prompt_tokens: int, negative_tokens: int, scale: float) -> dict[str, np.ndarray]:
    """Random inputs, batch 1."""
    random, given = np.random.RandomState(0), {}
    lengths = {"prompt_states": prompt_tokens, "negative_states": negative_tokens}
    for spec in generator.inputs:
        shape = [1 if size is None else size for size in spec.shape]
        if spec.name in lengths:
            shape[1] = spec.shape[1] or lengths[spec.name]
        given[spec.name] = random.standard_normal(shape).astype(np.float32)
    given["negative_scale"][:] = scale
    return given


def seconds(generator: Engine, case: dict[str, np.ndarray]) -> float:
    """What one call takes."""
    given = {spec.name: case[spec.name] for spec in generator.inputs}
    start = time.perf_counter()
    generator(**given)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
