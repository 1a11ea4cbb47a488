"""Times a bundle beside what else a user could run, in one process and in turns: seconds a stage, ratios, and the error in the latent.

The peers are built from the same folder of weights: diffusers as it is (fp32, bf16), torch.compile, diffusers' own UNet as an ONNX graph in
ONNX Runtime (what optimum does) and in OpenVINO with its own choices, static shapes and bf16 (what optimum-intel and openvino.genai do).
PixArt has no peer outside torch. Prompt states are given, as from a cache.

python tools/compare.py --student runs/random/pixart --bundle runs/pixart --out docs/compare/pixart.json
"""

import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from snoopi_rt.bundle import Bundle
from snoopi_rt.cache import Cache
from snoopi_rt.engines import installed, load_engine
from snoopi_rt.export.checkpoint import load_module
from snoopi_rt.export.preset import override
from snoopi_rt.export.presets import find_preset

warnings.filterwarnings("ignore")
TOKENS = {"pixart": (20, 20), "sd15": (77, 77), "sd21": (77, 77), "sdxl": (77, 77)}
BASELINE = "diffusers fp32"
Run = Callable[[], np.ndarray]


@click.command()
@click.option("--student", type=click.Path(path_type=Path), required=True, help="The folder that the bundle was exported from.")
@click.option("--bundle", "folder", type=click.Path(path_type=Path), required=True)
@click.option("--tiny", type=click.Path(path_type=Path), help="A TAESD folder, for the peers' tiny decoder.")
@click.option("--runs", default=7, help="Calls of each, in turns.")
@click.option("--compiled/--not-compiled", default=True, help="torch.compile takes a minute or two.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where to write the JSON.")
def main(student: Path, folder: Path, tiny: Path | None, runs: int, compiled: bool, out: Path) -> None:
    """Print the table and write it as JSON."""
    bundle = Bundle.load(folder)
    row, *settings = bundle.provenance["preset"].split()
    preset = override(find_preset(row), settings)
    height, width = bundle.sizes[0]
    random = torch.Generator().manual_seed(1)
    noise = torch.randn(1, bundle.latent.channels, height // 8, width // 8, generator=random)
    stages = {"generator": dict(generators(bundle, student, preset, noise, compiled))}
    latent = stages["generator"][BASELINE]()
    vae = student / "vae"
    stages["decoder"] = dict(decoders(bundle, "decoder", vae if tiny is None else tiny, torch.from_numpy(latent)))
    if tiny is not None:
        stages["full decoder"] = dict(decoders(None, "decoder", vae, torch.from_numpy(latent)))
    document = {"bundle": bundle.name, "backbone": bundle.backbone, "size": f"{width}x{height}", "runs": runs, "stages": {}}
    for stage, contenders in stages.items():
        measured = measure(contenders, runs)
        document["stages"][stage] = measured
        click.echo(f"\n{stage}\n{table(measured)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")


def measure(contenders: dict[str, Run], runs: int) -> dict[str, dict[str, float]]:
    """Median and minimum seconds of each, its ratio to the baseline, and the rms distance of what it gives."""
    wanted = contenders[BASELINE]().astype(np.float64)
    error = {name: float(np.sqrt(np.mean((run().astype(np.float64) - wanted) ** 2))) for name, run in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(runs):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds[BASELINE])
    return {
        name: {
            "median": statistics.median(taken),
            "min": min(taken),
            "ratio": statistics.median(taken) / base,
            "error": error[name],
        }
        for name, taken in seconds.items()
    }


def generators(bundle: Bundle, student: Path, preset: Any, noise: torch.Tensor, compiled: bool) -> Iterator[tuple[str, Run]]:
    """Every way to the clean latent, by name; those of the bundle with and without a negative prompt at scale 0."""
    from diffusers import PixArtTransformer2DModel, UNet2DConditionModel

    pixart = bundle.backbone == "pixart"
    network = load_module(student / ("transformer" if pixart else "unet"), PixArtTransformer2DModel if pixart else UNet2DConditionModel)
    tokens, negative_tokens = TOKENS[bundle.backbone]
    width = network.caption_projection.linear_2.out_features if pixart else network.config.cross_attention_dim
    random = torch.Generator().manual_seed(2)
    states, negative = (torch.randn(1, count, width, generator=random) for count in (tokens, negative_tokens))
    if pixart:
        network.caption_projection = None
    extra: dict[str, Any] = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if pixart else {}
    pooled = torch.randn(1, 1280, generator=random)
    if bundle.backbone == "sdxl":
        extra = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.tensor([preset.time_ids])}}
    rule = preset.rule

    def diffusers(model: Callable[..., Any], dtype: torch.dtype) -> Run:
        given = {key: {name: None if value is None else value.to(dtype) for name, value in kinds.items()} for key, kinds in extra.items()}

        @torch.inference_mode()
        def run() -> np.ndarray:
            def answer(step: int, latent: torch.Tensor) -> torch.Tensor:
                timestep = torch.tensor([rule.steps[step].timestep])
                found = model(latent.to(dtype), encoder_hidden_states=states.to(dtype), timestep=timestep, return_dict=False, **given)[0]
                return found[:, : latent.shape[1]].float()

            return rule.run(answer, noise).numpy()

        return run

    yield BASELINE, diffusers(network, torch.float32)
    half = load_module(student / ("transformer" if pixart else "unet"), type(network)).to(torch.bfloat16)
    if pixart:
        half.caption_projection = None
    yield "diffusers bf16", diffusers(half, torch.bfloat16)
    if compiled:
        yield "torch.compile bf16", diffusers(torch.compile(half), torch.bfloat16)
    if not pixart:
        yield from unet_peers(network, rule, noise, states, extra, student)
    feeds = {
        "noise": noise.numpy(),
        "prompt_states": states.numpy(),
        "negative_states": np.zeros_like(negative[:, :1].numpy()),
        "negative_scale": np.zeros(1, np.float32),
        "prompt_pooled": pooled.numpy(),
    }
    guided = {**feeds, "negative_states": negative.numpy()}
    for name, engine in builds(bundle, "generator"):
        yield f"ours {name}", lambda engine=engine: engine(**{spec.name: feeds[spec.name] for spec in engine.inputs})["latent"]
        yield f"ours {name}, negative", lambda engine=engine: engine(**{spec.name: guided[spec.name] for spec in engine.inputs})["latent"]


def unet_peers(
    network: torch.nn.Module, rule: Any, noise: torch.Tensor, states: torch.Tensor, extra: dict[str, Any], student: Path
) -> Iterator[tuple[str, Run]]:
    """diffusers' UNet as a graph that takes the timestep, in ONNX Runtime and OpenVINO, each with its own defaults."""
    import onnxruntime
    import openvino

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
            return self.network(sample, timestep, encoder_hidden_states, return_dict=False, **extra)[0]

    example = {"sample": noise, "timestep": torch.tensor([rule.timestep]), "encoder_hidden_states": states}
    path = student / ".compare" / "unet.onnx"
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        with torch.no_grad():
            torch.onnx.export(Plain().eval(), kwargs=example, input_names=list(example), dynamo=True, opset_version=18).save(
                path, external_data=True
            )
    given = {name: value.numpy() for name, value in example.items()}
    given["sample"] = (rule.input_scale * noise).numpy()

    def read(answer: np.ndarray) -> np.ndarray:
        return rule.x0(noise, torch.from_numpy(answer)).numpy()

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    yield "ONNX Runtime fp32 (as optimum)", lambda: read(session.run(None, given)[0])
    compiled = openvino.Core().compile_model(str(path), "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    yield "OpenVINO bf16 (as optimum-intel)", lambda: read(compiled(given)[0])


def decoders(bundle: Bundle | None, graph: str, vae: Path, latent: torch.Tensor) -> Iterator[tuple[str, Run]]:
    """Every way from the latent to the picture, by name."""
    import diffusers
    import openvino

    from snoopi_rt.export.decoder import Decoder

    kind = getattr(diffusers, json.loads((vae / "config.json").read_text())["_class_name"])
    full, half = Decoder(load_module(vae, kind)), Decoder(load_module(vae, kind).to(torch.bfloat16))
    yield BASELINE, torch.inference_mode()(lambda: full(latent).numpy())
    yield "diffusers bf16", torch.inference_mode()(lambda: half(latent.to(torch.bfloat16)).numpy())
    with torch.no_grad():
        converted = openvino.convert_model(full, example_input=latent)
    compiled = openvino.Core().compile_model(converted, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    yield "OpenVINO bf16 (as optimum-intel)", lambda: compiled({0: latent.numpy()})[0]
    for name, engine in builds(bundle, graph) if bundle is not None else ():
        yield f"ours {name}", lambda engine=engine: engine(latent=latent.numpy())["image"]


def builds(bundle: Bundle, graph: str) -> Iterator[tuple[str, Any]]:
    """Every build of the graph on every installed engine that it is for."""
    cache = Cache()
    for build in bundle.graphs[graph]:
        for engine in build.engines:
            if engine in installed():
                path = bundle.folder / build.files[0].path
                yield f"{engine} {build.precision}", load_engine(engine, path, build.precision, cache=cache, key=build.hash)


def table(measured: dict[str, dict[str, float]]) -> str:
    """The measurements as lines for people."""
    lines = [f"{'':36}{'median s':>10}{'min s':>10}{'ratio':>8}{'rms error':>12}"]
    lines += [f"{name:36}{row['median']:10.3f}{row['min']:10.3f}{row['ratio']:8.3f}{row['error']:12.2g}" for name, row in measured.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
