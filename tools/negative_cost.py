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
@click.option("--tokens", type=int, multiple=True, default=[20], help="Of the negative prompt; can be repeated.")
@click.option("--prompt-tokens", default=20)
@click.option("--engine", default="openvino")
@click.option("--precision", help="Of the generators.  [default: each bundle's first]")
@click.option("--pairs", default=15)
@click.option("--out", type=click.Path(path_type=Path), help="Where to write the JSON.")
def main(
    guided: Path, plain: Path, tokens: tuple[int, ...], prompt_tokens: int, engine: str, precision: str | None, pairs: int, out: Path | None
) -> None:
    """Print the median of the pairs' ratios."""
    variants = {
        name: Bundle.load(folder).variant("generator", engine, precision) for name, folder in (("guided", guided), ("plain", plain))
    }
    if len({variant.precision for variant in variants.values()}) > 1:
        raise click.UsageError(
            f"the bundles' precisions differ: {', '.join(variant.precision for variant in variants.values())}: give --precision"
        )
    engines = {name: opened(folder, engine, variants[name]) for name, folder in (("guided", guided), ("plain", plain))}
    document = {"engine": engine, "precision": variants["guided"].precision, "pairs": pairs, "prompt_tokens": prompt_tokens, "rows": []}
    base = random_inputs(engines["guided"], prompt_tokens, 1, 0.0)
    samples = {"no negative": base, **{f"{count} tokens": random_inputs(engines["guided"], prompt_tokens, count, 0.5) for count in tokens}}
    for name, sample in samples.items():
        timings: list[tuple[float, float]] = []
        for number in range(pairs + 2):
            first = seconds(engines["plain"], sample)
            second = seconds(engines["guided"], sample)
            if number >= 2:
                timings.append((first, second))
        ratios = [second / first for first, second in timings]
        row = {
            "negative": name,
            "plain": statistics.median(first for first, _ in timings),
            "guided": statistics.median(second for _, second in timings),
            "extra": statistics.median(ratios) - 1,
        }
        document["rows"].append(row)
        click.echo(f"{name:16}{row['plain']:9.3f} s{row['guided']:9.3f} s{100 * row['extra']:+8.2f} %")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def opened(folder: Path, engine: str, variant: Variant) -> Engine:
    """The generator of a bundle."""
    return load_engine(engine, folder / variant.files[0].path, variant.precision, cache=Cache(), key=variant.hash)


def random_inputs(generator: Engine, prompt_tokens: int, negative_tokens: int, scale: float) -> dict[str, np.ndarray]:
    """Random inputs, batch 1."""
    random, inputs = np.random.RandomState(0), {}
    lengths = {"prompt_states": prompt_tokens, "negative_states": negative_tokens}
    for spec in generator.inputs:
        shape = [1 if size is None else size for size in spec.shape]
        if spec.name in lengths:
            shape[1] = spec.shape[1] or lengths[spec.name]
        inputs[spec.name] = random.standard_normal(shape).astype(np.float32)
    inputs["negative_scale"][:] = scale
    return inputs


def seconds(generator: Engine, sample: dict[str, np.ndarray]) -> float:
    """How long one call takes."""
    inputs = {spec.name: sample[spec.name] for spec in generator.inputs}
    start = time.perf_counter()
    generator(**inputs)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
