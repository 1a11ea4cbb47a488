"""Times a bundle beside what else a user could run, in one process and in turns: seconds a stage, ratios, and the error in the latent.

The peers are built from the same folder of weights: diffusers as it is (fp32, bf16), torch.compile, diffusers' own UNet as an ONNX graph in
ONNX Runtime (what optimum does) and in OpenVINO with its own choices, static shapes and bf16 (what optimum-intel and openvino.genai do).
PixArt has no peer outside torch. Prompt states are those of the bundle's own text encoder, given as from a cache; the stage `image` is the
generator and the decoder, for the bundle through its pipeline.

python tools/compare.py --student runs/random/pixart --bundle runs/pixart --out docs/compare/pixart.json
"""

import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import snoopi_rt
from snoopi_rt.bundle import Build, Bundle
from snoopi_rt.cache import Cache
from snoopi_rt.engines import installed, load_engine
from snoopi_rt.engines.base import Engine
from snoopi_rt.export.backbones.pixart import size_condition
from snoopi_rt.export.checkpoint import load_module
from snoopi_rt.export.preset import Preset, override
from snoopi_rt.export.presets import find_preset
from snoopi_rt.feeds import draw_noise
from snoopi_rt.tokenizer import Tokenizer

warnings.filterwarnings("ignore")
PROMPT, NEGATIVE = "a dog wearing a blue scarf in the snow, photo", "blurry, low quality, deformed hands, watermark"
TOKENS = 20
"""Texts are cut to as many where the bundle does not pad them to a length of its own."""
SEED = 1
BASELINE, HALF = "diffusers fp32", "diffusers bf16"
Run = Callable[[], np.ndarray]
Decode = Callable[[np.ndarray], np.ndarray]


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
    texts, states = encoded(bundle)
    latent = bundle.latent
    shape = (latent.channels, *(side // latent.factor for side in bundle.sizes[0]))
    noise, renoise = draw_noise(SEED, shape, len(preset.rule.steps) - 1)
    scale = np.array([bundle.guidance.scale.default], np.float32)
    given = {"noise": noise[None], "renoise": renoise[None], **states, "negative_scale": scale}
    vae = student / "vae" if tiny is None else tiny
    document = {"bundle": bundle.name, "backbone": bundle.backbone, "texts": texts, "runs": runs, "stages": {}}
    document["tokens"] = {name: value.shape[1] for name, value in states.items() if name.endswith("states")}

    def show(stage: str, contenders: dict[str, Run]) -> None:
        document["stages"][stage] = measure(contenders, runs)
        click.echo(f"\n{stage}\n{table(document['stages'][stage])}")

    generate = dict(generators(bundle, student, preset, given, compiled))
    show("generator", generate)
    # Only what the images need stays in memory.
    generate = {name: generate[name] for name in (BASELINE, HALF)}
    found = generate[BASELINE]()
    decode = dict(decoders(bundle, vae, found))
    show("decoder", {name: partial(run, found) for name, run in decode.items()})
    show("image", dict(images(bundle, texts, generate, decode)))
    if tiny is not None:
        show("full decoder", {name: partial(run, found) for name, run in decoders(None, student / "vae", found)})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")


def encoded(bundle: Bundle) -> tuple[tuple[str, str], dict[str, np.ndarray]]:
    """The prompt and the negative as they are used, and what the text encoder makes of them, by name of the generator's inputs."""
    text, states = bundle.text, {}
    assert text.tokenizer is not None
    tokenizer = Tokenizer(bundle.folder / text.tokenizer.path, text.max_tokens, text.lowercase, text.pad)
    engine = fastest(bundle, "text_encoder")
    texts = tuple(cut(words, tokenizer, text.pad is None) for words in (PROMPT, NEGATIVE))
    for kind, words in zip(("prompt", "negative"), texts, strict=True):
        states |= {f"{kind}_{name}": value for name, value in engine(ids=tokenizer(words)).items()}
    engine.close()
    return texts, states


def cut(words: str, tokenizer: Tokenizer, to_length: bool) -> str:
    """The longest beginning of `words` of at most TOKENS tokens."""
    while to_length and tokenizer(words).shape[1] > TOKENS:
        words = words[:-1]
    return words.strip()


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


def generators(bundle: Bundle, student: Path, preset: Preset, given: dict[str, np.ndarray], compiled: bool) -> Iterator[tuple[str, Run]]:
    """Every way to the clean latent, by name; those of the bundle without and with the negative prompt."""
    from diffusers import PixArtTransformer2DModel, UNet2DConditionModel

    pixart, rule = bundle.backbone == "pixart", preset.rule
    part, kind = ("transformer", PixArtTransformer2DModel) if pixart else ("unet", UNet2DConditionModel)
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}
    extra: dict[str, Any] = {}
    if bundle.backbone == "sdxl":
        extra = {"added_cond_kwargs": {"text_embeds": tensors["prompt_pooled"], "time_ids": torch.tensor([preset.time_ids])}}

    def loaded(dtype: torch.dtype) -> torch.nn.Module:
        network = load_module(student / part, kind, dtype=dtype)
        if pixart:
            network.caption_projection = None  # it is in the prompt states
        return network

    def diffusers(model: Callable[..., Any], dtype: torch.dtype) -> Run:
        cast = {key: {name: None if value is None else value.to(dtype) for name, value in kinds.items()} for key, kinds in extra.items()}
        states = tensors["prompt_states"].to(dtype)

        @torch.inference_mode()
        def run() -> np.ndarray:
            def answer(step: int, latent: torch.Tensor) -> torch.Tensor:
                timestep = torch.tensor([rule.steps[step].timestep])
                found = model(latent.to(dtype), encoder_hidden_states=states, timestep=timestep, return_dict=False, **cast)[0]
                return found[:, : latent.shape[1]].float()

            return rule.run(answer, tensors["noise"], tensors["renoise"]).numpy()

        return run

    network, half = loaded(torch.float32), loaded(torch.bfloat16)
    if pixart:
        extra = {"added_cond_kwargs": size_condition(network, bundle.sizes[0], 1)}
    yield BASELINE, diffusers(network, torch.float32)
    yield HALF, diffusers(half, torch.bfloat16)
    if compiled:
        yield "torch.compile bf16", diffusers(torch.compile(half), torch.bfloat16)
    if not pixart and len(rule.steps) == 1:
        yield from unet_peers(network, rule, tensors["noise"], tensors["prompt_states"], extra)
    # As the runtime feeds it: one token at scale 0.
    plain = {**given, "negative_states": np.zeros_like(given["negative_states"][:, :1]), "negative_scale": np.zeros(1, np.float32)}
    for name, engine in builds(bundle, "generator"):
        yield f"ours {name}", _call(engine, plain, "latent")
        yield f"ours {name}, negative", _call(engine, given, "latent")


def images(bundle: Bundle, texts: tuple[str, str], generate: dict[str, Run], decode: dict[str, Decode]) -> Iterator[tuple[str, Run]]:
    """From cached prompt states to the picture; the bundle's with the fastest builds that it has for OpenVINO."""
    for name in (BASELINE, HALF):
        yield name, lambda name=name: decode[name](generate[name]())
    pipe = snoopi_rt.load(bundle, engine="openvino", low_memory=True)
    yield "ours", lambda: pipe.generate(texts[0], seed=SEED).images
    yield "ours, negative", lambda: pipe.generate(texts[0], texts[1], seed=SEED).images


def unet_peers(
    network: torch.nn.Module, rule: Any, noise: torch.Tensor, states: torch.Tensor, extra: dict[str, Any]
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
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "unet.onnx"
        with torch.no_grad():
            torch.onnx.export(Plain().eval(), kwargs=example, input_names=list(example), dynamo=True, opset_version=18).save(
                path, external_data=True
            )
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        compiled = openvino.Core().compile_model(str(path), "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    given = {name: value.numpy() for name, value in example.items()}
    given["sample"] = (rule.input_scale * noise).numpy()

    def read(answer: np.ndarray) -> np.ndarray:
        return rule.x0(noise, torch.from_numpy(answer)).numpy()

    yield "ONNX Runtime fp32 (as optimum)", lambda: read(session.run(None, given)[0])
    yield "OpenVINO bf16 (as optimum-intel)", lambda: read(compiled(given)[0])


def decoders(bundle: Bundle | None, vae: Path, example: np.ndarray) -> Iterator[tuple[str, Decode]]:
    """Every way from a latent to its picture, by name."""
    import diffusers
    import openvino

    from snoopi_rt.export.decoder import Decoder

    kind = getattr(diffusers, json.loads((vae / "config.json").read_text())["_class_name"])
    full, half = Decoder(load_module(vae, kind)), Decoder(load_module(vae, kind, dtype=torch.bfloat16))
    yield BASELINE, torch.inference_mode()(lambda latent: full(torch.from_numpy(latent)).numpy())
    yield HALF, torch.inference_mode()(lambda latent: half(torch.from_numpy(latent).to(torch.bfloat16)).numpy())
    with torch.no_grad():
        converted = openvino.convert_model(full, example_input=torch.from_numpy(example))
    compiled = openvino.Core().compile_model(converted, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    yield "OpenVINO bf16 (as optimum-intel)", lambda latent: compiled({0: latent})[0]
    for name, engine in builds(bundle, "decoder") if bundle is not None else ():
        yield f"ours {name}", lambda latent, engine=engine: engine(latent=latent)["image"]


def builds(bundle: Bundle, graph: str) -> Iterator[tuple[str, Engine]]:
    """Every build of the graph on every installed engine that it is for."""
    for build in bundle.graphs[graph]:
        for engine in build.engines:
            if engine in installed():
                yield f"{engine} {build.precision}", opened(bundle, build, engine)


def fastest(bundle: Bundle, graph: str) -> Engine:
    """The graph's first build, on OpenVINO where it is for it."""
    build = bundle.graphs[graph][0]
    return opened(bundle, build, max(build.engines, key=lambda name: name == "openvino"))


def opened(bundle: Bundle, build: Build, engine: str) -> Engine:
    """One build on one engine, through the cache."""
    return load_engine(engine, bundle.folder / build.files[0].path, build.precision, cache=Cache(), key=build.hash)


def _call(engine: Engine, given: dict[str, np.ndarray], output: str) -> Run:
    feeds = {spec.name: given[spec.name] for spec in engine.inputs}
    return lambda: engine(**feeds)[output]


def table(measured: dict[str, dict[str, float]]) -> str:
    """The measurements as lines for people."""
    lines = [f"{'':36}{'median s':>10}{'min s':>10}{'ratio':>8}{'rms error':>12}"]
    lines += [f"{name:36}{row['median']:10.3f}{row['min']:10.3f}{row['ratio']:8.3f}{row['error']:12.2g}" for name, row in measured.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
