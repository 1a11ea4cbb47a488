"""Times a bundle beside what else a user could run: seconds a stage, ratios, and the error in the latent.

Each contender is alone in memory with the baseline, diffusers in fp32, and is called in turns with it: two at full size fit, ten do not.
The peers are built from the same folder of weights: diffusers as it is (fp32, bf16), torch.compile, diffusers' own UNet as an ONNX graph in
ONNX Runtime (what optimum does) and in OpenVINO with its own choices, static shapes and bf16 (what optimum-intel and openvino.genai do).
PixArt has no peer outside torch. Prompt states are those of the bundle's own text encoder, given as from a cache; the stage `image` is the
generator and the decoder, for the bundle through its pipeline. With --tiny the stage `decoder` is the tiny one, without it the full one.

python tools/compare.py --student runs/pixart --bundle bundles/pixart --out docs/compare/pixart.json
"""

import contextlib
import gc
import io
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import snoopi_rt
from snoopi_rt.bundle.bundle import Bundle, Variant
from snoopi_rt.cache import Cache
from snoopi_rt.engines import installed, load_engine
from snoopi_rt.engines.base import Engine
from snoopi_rt.engines.openvino import import_openvino
from snoopi_rt.engines.ort import import_onnxruntime
from snoopi_rt.export.backbones.pixart import size_condition
from snoopi_rt.export.presets.preset import Preset, override
from snoopi_rt.export.presets.rows import find_preset
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.runtime.auto_engine import ORDER
from snoopi_rt.runtime.inputs import draw_noise
from snoopi_rt.tokenizer import Tokenizer

warnings.filterwarnings("ignore")
PROMPT, NEGATIVE = "a dog wearing a blue scarf in the snow, photo", "blurry, low quality, deformed hands, watermark"
TOKENS = 20
"""Texts are cut to as many where the bundle does not pad them to a length of its own."""
SEED = 1
STAGES = ("generator", "decoder", "image", "full decoder")
BASELINE, HALF = "diffusers fp32", "diffusers bf16"
Run = Callable[[], np.ndarray]
Decode = Callable[[np.ndarray], np.ndarray]
Contenders = dict[str, Callable[[], Callable[..., np.ndarray]]]
"""By name what loads a contender: it is in memory as long as its answer is held."""


@click.command()
@click.option("--student", type=click.Path(path_type=Path), required=True, help="The folder that the bundle was exported from.")
@click.option("--bundle", "folder", type=click.Path(path_type=Path), required=True)
@click.option("--tiny", type=click.Path(path_type=Path), help="A TAESD folder, for the peers' tiny decoder.")
@click.option("--runs", default=7, help="Calls of each, in turns.")
@click.option("--compiled/--not-compiled", default=True, help="torch.compile takes a minute or two.")
@click.option("--stage", "stages", type=click.Choice(STAGES), multiple=True, default=STAGES, help="Only this stage; may be given again.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where to write the JSON.")
def main(student: Path, folder: Path, tiny: Path | None, runs: int, compiled: bool, stages: Sequence[str], out: Path) -> None:
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
    out.parent.mkdir(parents=True, exist_ok=True)
    document["tokens"] = {name: value.shape[1] for name, value in states.items() if name.endswith("states")}

    def show(stage: str, contenders: Contenders, *given: np.ndarray) -> None:
        if stage not in stages:
            return
        document["stages"][stage] = measure(contenders, runs, given)
        click.echo(f"\n{stage}\n{table(document['stages'][stage])}")
        # After each stage: the next may take minutes, or the memory.
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    generate = generators(bundle, student, preset, given, compiled)
    show("generator", generate)
    found = generate[BASELINE]()()
    decode = decoders(bundle, vae, found)
    show("decoder", decode, found)
    show("image", images(bundle, texts, generate, decode))
    if tiny is not None:
        show("full decoder", decoders(None, student / "vae", found), found)


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


def measure(contenders: Contenders, runs: int, given: Sequence[np.ndarray] = ()) -> dict[str, dict[str, float]]:
    """Median and minimum seconds of each, its ratio to the baseline, and the rms distance to what that gives."""
    baseline = contenders[BASELINE]()
    wanted, all_base, rows = baseline(*given), [], {BASELINE: {}}
    for name, load in contenders.items():
        if name == BASELINE:
            continue
        gc.collect()
        run = load()
        error = float(np.sqrt(np.mean((run(*given).astype(np.float64) - wanted.astype(np.float64)) ** 2)))
        pairs = [(seconds(baseline, given), seconds(run, given)) for _ in range(runs)]
        all_base += [base for base, _ in pairs]
        taken = [own for _, own in pairs]
        ratio = statistics.median(own / base for base, own in pairs)
        rows[name] = {"median": statistics.median(taken), "min": min(taken), "ratio": ratio, "error": error}
        click.echo(f"{name}: {rows[name]['median']:.3f} s, {ratio:.3f} of the baseline", err=True)
        del run
    rows[BASELINE] = {"median": statistics.median(all_base), "min": min(all_base), "ratio": 1.0, "error": 0.0}
    return rows


def seconds(run: Callable[..., np.ndarray], given: Sequence[np.ndarray]) -> float:
    """What one call takes."""
    start = time.perf_counter()
    run(*given)
    return time.perf_counter() - start


def generators(bundle: Bundle, student: Path, preset: Preset, given: dict[str, np.ndarray], compiled: bool) -> Contenders:
    """Every way to the clean latent, by name; those of the bundle without and with the negative prompt."""
    from diffusers import PixArtTransformer2DModel, UNet2DConditionModel

    pixart, rule = bundle.backbone == "pixart", preset.rule
    part, kind = ("transformer", PixArtTransformer2DModel) if pixart else ("unet", UNet2DConditionModel)
    tensors = {name: torch.from_numpy(value) for name, value in given.items()}

    def network(dtype: torch.dtype) -> torch.nn.Module:
        loaded = load_module(student / part, kind, dtype=dtype)
        if pixart:
            loaded.caption_projection = None  # it is in the prompt states
        return loaded

    def condition(loaded: torch.nn.Module, dtype: torch.dtype) -> dict[str, Any]:
        kinds = size_condition(loaded, bundle.sizes[0], 1) if pixart else {}
        if bundle.backbone == "sdxl":
            kinds = {"text_embeds": tensors["prompt_pooled"], "time_ids": torch.tensor([preset.time_ids])}
        return {"added_cond_kwargs": {name: None if value is None else value.to(dtype) for name, value in kinds.items()}} if kinds else {}

    def diffusers(dtype: torch.dtype, through: Callable[[torch.nn.Module], Callable[..., Any]] = lambda module: module) -> Run:
        loaded, states = network(dtype), tensors["prompt_states"].to(dtype)
        model, extra = through(loaded), condition(loaded, dtype)

        @torch.inference_mode()
        def run() -> np.ndarray:
            def answer(step: int, latent: torch.Tensor) -> torch.Tensor:
                timestep = torch.tensor([rule.steps[step].timestep])
                found = model(latent.to(dtype), encoder_hidden_states=states, timestep=timestep, return_dict=False, **extra)[0]
                return found[:, : latent.shape[1]].float()

            return rule.run(answer, tensors["noise"], tensors["renoise"]).numpy()

        return run

    found: Contenders = {BASELINE: partial(diffusers, torch.float32), HALF: partial(diffusers, torch.bfloat16)}
    if compiled:
        found["torch.compile bf16"] = partial(diffusers, torch.bfloat16, torch.compile)
    if not pixart and len(rule.steps) == 1:
        for name, compile_peer in (("ONNX Runtime fp32 (as optimum)", in_onnxruntime), ("OpenVINO bf16 (as optimum-intel)", in_openvino)):
            found[name] = partial(unet_peer, network, condition, rule, tensors["noise"], tensors["prompt_states"], compile_peer)
    # As the runtime feeds it: one token at scale 0.
    plain = {**given, "negative_states": np.zeros_like(given["negative_states"][:, :1]), "negative_scale": np.zeros(1, np.float32)}
    for name, load in builds(bundle, "generator").items():
        for way, feeds in (("", plain), (", negative", given)):
            found[f"ours {name}{way}"] = partial(_latent_of, load, feeds)
    return found


def images(bundle: Bundle, texts: tuple[str, str], generate: Contenders, decode: Contenders) -> Contenders:
    """From cached prompt states to the picture; the bundle's with the fastest builds that it has for OpenVINO."""

    def diffusers(name: str) -> Run:
        latent, picture = generate[name](), decode[name]()
        return lambda: picture(latent())

    def ours(*prompts: str) -> Run:
        pipe = snoopi_rt.load(bundle, engine="openvino", low_memory=True)
        return lambda: pipe.generate(*prompts, seed=SEED).images

    return {
        **{name: partial(diffusers, name) for name in (BASELINE, HALF)},
        "ours": partial(ours, texts[0]),
        "ours, negative": partial(ours, *texts),
    }


def unet_peer(
    network: Callable[[torch.dtype], torch.nn.Module],
    condition: Callable[[torch.nn.Module, torch.dtype], dict[str, Any]],
    rule: Any,
    noise: torch.Tensor,
    states: torch.Tensor,
    compile_peer: Callable[[Path], Callable[[dict[str, np.ndarray]], np.ndarray]],
) -> Run:
    """diffusers' UNet as a graph that takes the timestep, in an engine with its own defaults."""

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network(torch.float32)
            self.extra = condition(self.network, torch.float32)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
            return self.network(sample, timestep, encoder_hidden_states, return_dict=False, **self.extra)[0]

    example = {"sample": noise, "timestep": torch.tensor([rule.timestep]), "encoder_hidden_states": states}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "unet.onnx"
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(Plain().eval(), kwargs=example, input_names=list(example), dynamo=True, opset_version=18).save(
                path, external_data=True
            )
        gc.collect()
        peer = compile_peer(path)
    given = {name: value.numpy() for name, value in example.items()}
    given["sample"] = (rule.input_scale * noise).numpy()
    return lambda: rule.x0(noise, torch.from_numpy(peer(given))).numpy()


def in_onnxruntime(path: Path) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """A session with ONNX Runtime's own choices."""
    session = import_onnxruntime().InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda given: session.run(None, given)[0]


def in_openvino(path: Path) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """A model compiled with OpenVINO's own choices."""
    compiled = import_openvino().Core().compile_model(str(path), "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    return lambda given: compiled(given)[0]


def decoders(bundle: Bundle | None, vae: Path, example: np.ndarray) -> Contenders:
    """Every way from a latent to its picture, by name."""
    import diffusers

    from snoopi_rt.export.decoder import Decoder

    kind = getattr(diffusers, json.loads((vae / "config.json").read_text(encoding="utf-8"))["_class_name"])

    def eager(dtype: torch.dtype) -> Decode:
        decoder = Decoder(load_module(vae, kind, dtype=dtype))
        return torch.inference_mode()(lambda latent: decoder(torch.from_numpy(latent).to(dtype)).numpy())

    def in_openvino() -> Decode:
        openvino = import_openvino()
        with torch.no_grad():
            converted = openvino.convert_model(Decoder(load_module(vae, kind)), example_input=torch.from_numpy(example))
        compiled = openvino.Core().compile_model(converted, "CPU", {"PERFORMANCE_HINT": "LATENCY"})
        return lambda latent: compiled({0: latent})[0]

    def ours(load: Callable[[], Engine]) -> Decode:
        engine = load()
        return lambda latent: engine(latent=latent)["image"]

    return {
        BASELINE: partial(eager, torch.float32),
        HALF: partial(eager, torch.bfloat16),
        "OpenVINO bf16 (as optimum-intel)": in_openvino,
        **{f"ours {name}": partial(ours, load) for name, load in (builds(bundle, "decoder").items() if bundle else ())},
    }


def builds(bundle: Bundle, graph: str) -> dict[str, Callable[[], Engine]]:
    """Every build of the graph on every installed engine that it is for."""
    return {
        f"{engine} {build.precision}": partial(opened, bundle, build, engine)
        for build in bundle.graphs[graph]
        for engine in build.engines
        if engine in ORDER and engine in installed()
    }


def fastest(bundle: Bundle, graph: str) -> Engine:
    """The graph's first build, on OpenVINO where one is for it."""
    build = bundle.variant(graph, "openvino")
    return opened(bundle, build, max(build.engines, key=lambda name: name == "openvino"))


def opened(bundle: Bundle, build: Variant, engine: str) -> Engine:
    """One build on one engine, through the cache."""
    return load_engine(engine, bundle.folder / build.files[0].path, build.precision, cache=Cache(), key=build.hash)


def _latent_of(load: Callable[[], Engine], given: dict[str, np.ndarray]) -> Run:
    engine = load()
    feeds = {spec.name: given[spec.name] for spec in engine.inputs}
    return lambda: engine(**feeds)["latent"]


def table(measured: dict[str, dict[str, float]]) -> str:
    """The measurements as lines for people."""
    lines = [f"{'':36}{'median s':>10}{'min s':>10}{'ratio':>8}{'rms error':>12}"]
    lines += [f"{name:36}{row['median']:10.3f}{row['min']:10.3f}{row['ratio']:8.3f}{row['error']:12.2g}" for name, row in measured.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
