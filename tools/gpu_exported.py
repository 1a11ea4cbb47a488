"""Times exported students in our engines on a GPU, with one and with all tokens of a negative prompt.

    python tools/gpu_exported.py --student pixart --out docs/gpu/exported.json

True architectures with random weights and TAESD, 512 x 512, fp16. Each image passes through the host's memory as in the runtime. Engines
whose package is not installed are left out before anything is exported, which takes minutes.
"""

import json
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import AutoencoderTiny
from gpu_students import NETWORKS, TOKENS, case, folded, student
from gpu_timing import gpu_name, interleaved
from torch import Tensor

from snoopi_rt.engines import installed, load_engine
from snoopi_rt.engines.base import Axis, Engine
from snoopi_rt.engines.messages import why
from snoopi_rt.errors import EngineError, InputError
from snoopi_rt.export.decoder import Decoder
from snoopi_rt.export.guidance import find_guidance
from snoopi_rt.export.onnx_graphs.mixed_precision import to_gpu_precision
from snoopi_rt.export.onnx_graphs.write import write_graph

ENGINES = ("tensorrt", "cuda")
TIMES = 20
"""How often each is timed."""


@click.command()
@click.option("--student", "kinds", type=click.Choice(list(NETWORKS)), multiple=True, default=tuple(NETWORKS))
@click.option("--batch", "batches", type=int, multiple=True, default=(1, 4, 8))
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(kinds: tuple[str, ...], batches: tuple[int, ...], out: Path) -> None:
    """Print the table and write it as JSON, line by line as it is measured."""
    document: dict[str, Any] = {"gpu": gpu_name(), "torch": torch.__version__, "rows": []}
    out.parent.mkdir(parents=True, exist_ok=True)
    engines = [engine for engine in ENGINES if engine in installed()]
    click.echo(f"engines: {', '.join(engines) or 'neither of ' + ' and '.join(ENGINES) + ' is installed'}")
    click.echo(f"{'student':8}{'batch':>6}{'engine':>10}{'1 token ms':>12}{'negative ms':>13}{'costs':>8}{'built s':>9}")
    for kind in kinds if engines else ():
        with tempfile.TemporaryDirectory() as folder:
            inputs = write(kind, Path(folder))
            for engine in engines:
                for row in measured(kind, Path(folder), inputs, engine, batches):
                    document["rows"].append(row)
                    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
                    click.echo(line(row))


def write(kind: str, folder: Path) -> dict[str, Tensor]:
    """Writes generator-gpu.onnx and decoder-gpu.onnx, and gives two images' inputs of the generator."""
    network = student(kind)
    inputs = case(kind, network, 2, True, torch.float32).arguments
    generator = folded(kind, network, find_guidance("nasa"))
    if kind == "pixart":  # the projection belongs to the text encoder's graph
        for name in ("prompt_states", "negative_states"):
            inputs[name] = generator.projection(inputs[name])
        generator = generator.network
    axes = {name: {0: "batch"} for name in inputs}
    axes["prompt_states"][1], axes["negative_states"][1] = "tokens", "negative_tokens"
    decoder, latent = Decoder(AutoencoderTiny()).eval().requires_grad_(False), {"latent": inputs["noise"]}
    write_graph(generator, inputs, ("latent",), axes, folder / "generator.onnx", "fp16")
    write_graph(decoder, latent, ("image",), {"latent": {0: "batch"}}, folder / "decoder.onnx", "fp16")
    for graph in ("generator", "decoder"):
        to_gpu_precision(folder / f"{graph}.onnx", folder / f"{graph}-gpu.onnx")
    return inputs


def measured(kind: str, folder: Path, inputs: dict[str, Tensor], engine: str, batches: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row for each batch; one that says why if the engine cannot run."""
    tokens, begun = TOKENS[kind], time.perf_counter()
    axes = {"batch": Axis(1, 1, max(batches)), "tokens": Axis(1, tokens, tokens), "negative_tokens": Axis(1, tokens, tokens)}
    models: dict[str, Engine] = {}
    rows: list[dict[str, Any]] = []
    try:
        for graph in ("generator", "decoder"):
            models[graph] = load_engine(engine, folder / f"{graph}-gpu.onnx", "fp16", axes=axes)
        built = time.perf_counter() - begun
        for batch in batches:
            arrays = {name: value[:1].expand(batch, *value.shape[1:]).contiguous().numpy() for name, value in inputs.items()}
            short = {**arrays, "negative_states": arrays["negative_states"][:, :1]}

            def draw(arrays: dict[str, Any]) -> None:
                latent = models["generator"](**arrays)["latent"]
                models["decoder"](latent=latent)["image"].__array__()

            seconds = interleaved({"one token": lambda short=short: draw(short), "negative": lambda arrays=arrays: draw(arrays)}, TIMES)
            rows.append({"student": kind, "batch": batch, "engine": engine, **seconds, "built": built})
    except (EngineError, InputError) as error:
        rows.append({"student": kind, "batch": batches[len(rows)], "engine": engine, "why not": why(error)})
    for model in models.values():
        with suppress(EngineError):  # one that has failed may not even close
            model.close()
    return rows


def line(row: dict[str, Any]) -> str:
    """The row for people."""
    name = f"{row['student']:8}{row['batch']:6}{row['engine']:>10}"
    if "why not" in row:
        return f"{name}  {row['why not']}"
    short, negative = row["one token"] * 1e3, row["negative"] * 1e3
    return f"{name}{short:12.2f}{negative:13.2f}{negative / short - 1:8.1%}{row['built']:9.1f}"


if __name__ == "__main__":
    main()
