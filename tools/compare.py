"""Times a bundle beside what else a user could run: seconds per stage, ratios, and the error in the latent.

Each contender is alone in memory with the baseline, and their calls are interleaved: two of full size fit, ten do not.

In the stages `generator`, `decoder`, `image` and `full decoder` the baseline is diffusers in fp32, and all are made of the same folder of
weights: diffusers as it is (fp32, bf16), torch.compile, and diffusers' own UNet, or SANA's transformer, as an ONNX graph in ONNX Runtime
(as optimum runs it) and in OpenVINO with its own choices, static shapes and bf16 (as optimum-intel runs it). PixArt has no peer outside
torch. Prompt states are those stored in the bundle or of its text encoder, as from a cache; the stage `image` is generator and
decoder, for the bundle through its pipeline.

The stage `peers` runs openvino.genai and stable-diffusion.cpp on the same weights beside the bundle, which is the baseline, from prompt to
image, a new prompt in each call (tools/peers.py). It takes SD 1.5 and 2.1 in one step, and what is installed of `pip install ".[peers]"`;
stable-diffusion.cpp is compiled then, which takes minutes.

With --tiny the decoder of all is the tiny one, except in the stage `full decoder`.
python tools/compare.py --student runs/pixart --bundle bundles/pixart --out docs/compare/pixart.json
"""

import gc
import itertools
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
import peers
from contenders import BASELINE, SEED, Contenders, decoders, fastest, generators, images

import snoopi_rt
from snoopi_rt.bundle.bundle import Bundle
from snoopi_rt.bundle.tokenizer import Tokenizer
from snoopi_rt.engines import installed
from snoopi_rt.export.onnx_graphs.parity import rms
from snoopi_rt.export.presets.choose import find_preset
from snoopi_rt.export.presets.preset import override
from snoopi_rt.prompt_encoder import read_prompt
from snoopi_rt.runtime.inputs import draw_noise

warnings.filterwarnings("ignore")
PROMPT, NEGATIVE = "a dog wearing a blue scarf in the snow, photo", "blurry, low quality, deformed hands, watermark"
TOKENS = 20
"""Texts are cut to this length unless the bundle pads them."""
STAGES = ("generator", "decoder", "image", "full decoder", "peers")
OURS = "ours"


@click.command()
@click.option("--student", type=click.Path(path_type=Path), required=True, help="The folder that the bundle was exported from.")
@click.option("--bundle", "folder", type=click.Path(path_type=Path), required=True)
@click.option("--tiny", type=click.Path(path_type=Path), help="A TAESD folder, for everyone's tiny decoder.")
@click.option("--runs", default=7, help="Timed calls of each, interleaved.")
@click.option("--compiled/--not-compiled", default=True, help="torch.compile takes a minute or two.")
@click.option("--stage", "stages", type=click.Choice(STAGES), multiple=True, default=STAGES, help="Only this stage; can be repeated.")
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
    inputs = {"noise": noise[None], "renoise": renoise[None], **states, "negative_scale": scale}
    vae = student / "vae" if tiny is None else tiny
    document = {"bundle": bundle.name, "backbone": bundle.backbone, "texts": texts, "runs": runs, "stages": {}}
    out.parent.mkdir(parents=True, exist_ok=True)
    document["tokens"] = {name: value.shape[1] for name, value in states.items() if name.endswith("states")}

    def show(stage: str, rows: dict[str, dict[str, Any]]) -> None:
        document["stages"][stage] = rows
        click.echo(f"\n{stage}\n{table(rows)}")
        # After each stage: the next may take minutes, or run out of memory.
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    def time_stage(stage: str, contenders: Contenders, *arrays: np.ndarray) -> None:
        if stage in stages:
            show(stage, measure(contenders, runs, lambda number: arrays))

    if set(stages) - {"peers"}:
        generate = generators(bundle, student, preset, inputs, compiled)
        time_stage("generator", generate)
        latent_array = generate[BASELINE]()()
        decode = decoders(bundle, vae, latent_array)
        time_stage("decoder", decode, latent_array)
        time_stage("image", images(bundle, texts, generate, decode))
        if tiny is not None:
            time_stage("full decoder", decoders(None, student / "vae", latent_array), latent_array)
    if "peers" in stages:
        for line in peers.missing():
            click.echo(line, err=True)
        if bundle.backbone not in peers.BACKBONES or len(preset.rule.steps) > 1 or "openvino" not in installed():
            click.echo(f"the stage peers is for {' and '.join(peers.BACKBONES)} in one step, with OpenVINO installed", err=True)
            return
        job = peers.Job(student, vae, bundle.sizes[0], preset.prediction, noise, SEED)
        with tempfile.TemporaryDirectory() as converted:
            contenders = {**our_pipelines(bundle), **peers.loaders(job, Path(converted))}
            # A new prompt in each call, and in each run of this script: nobody has its states in a cache.
            started = time.time_ns()
            show("peers", measure(contenders, runs, lambda number: (f"{PROMPT} {started + number}",)))


def encoded(bundle: Bundle) -> tuple[tuple[str, str], dict[str, np.ndarray]]:
    """The prompt and the negative as they are used, and their states, stored or encoded, by name of the generator's inputs."""
    states = {}
    if bundle.text.tokenizer is None:
        for kind, words in (("prompt", PROMPT), ("negative", NEGATIVE)):
            if bundle.prompts is None or words not in bundle.prompts.texts:
                raise click.UsageError(f"{bundle.folder} has no text encoder: export it with --prompts FILE, {words!r} a line of FILE")
            states |= {f"{kind}_{name}": value for name, value in read_prompt(bundle, bundle.prompts.texts.index(words)).items()}
        return (PROMPT, NEGATIVE), states
    tokenizer = bundle.open_tokenizer()
    engine = fastest(bundle, "text_encoder")
    texts = tuple(cut(words, tokenizer, bundle.text.pad is None) for words in (PROMPT, NEGATIVE))
    for kind, words in zip(("prompt", "negative"), texts, strict=True):
        states |= {f"{kind}_{name}": value for name, value in engine(ids=tokenizer(words)).items()}
    engine.close()
    return texts, states


def cut(words: str, tokenizer: Tokenizer, to_length: bool) -> str:
    """The longest beginning of `words` of at most TOKENS tokens."""
    while to_length and tokenizer(words).shape[1] > TOKENS:
        words = words[:-1]
    return words.strip()


def measure(contenders: Contenders, runs: int, arguments: Callable[[int], Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Median and minimum seconds of each, its median ratio to the first, which is the baseline, the rms distance to the baseline's output
    (None for other noise), and the median seconds of its parts, if it reports them.

    arguments: of a call, by a number that no two timed calls share: pipelines of ours share prompt states by way of the disk.
    """
    first, *others = contenders
    calls = itertools.count()
    baseline, all_base, rows = contenders[first](), [], {first: {}}
    for name in others:
        gc.collect()
        run = contenders[name]()
        untimed = arguments(next(calls))
        outputs = [draw(*untimed) for draw in (baseline, run)]
        error = rms(outputs[1].astype(np.float64) - outputs[0]) if getattr(run, "same_noise", True) else None
        pairs = [tuple(seconds(draw, *arguments(next(calls))) for draw in (baseline, run)) for _ in range(runs)]
        all_base += [base for base, _ in pairs]
        own_seconds = [own for _, own in pairs]
        ratio = statistics.median(own / base for base, own in pairs)
        rows[name] = {"median": statistics.median(own_seconds), "min": min(own_seconds), "ratio": ratio, "error": error}
        if parts := getattr(run, "parts", None):
            rows[name]["parts"] = {part: statistics.median(values[1:]) for part, values in parts.items()}
        click.echo(f"{name}: {rows[name]['median']:.3f} s, {ratio:.3f} of the baseline", err=True)
        del run
    rows[first] = {"median": statistics.median(all_base), "min": min(all_base), "ratio": 1.0, "error": 0.0}
    return rows


def our_pipelines(bundle: Bundle) -> dict[str, Callable[[], Callable[[str], np.ndarray]]]:
    """The bundle on OpenVINO, in the generator's first precision without and with the negative, and with it in the other precisions."""

    def load(precision: str, *negative: str) -> Callable[[str], np.ndarray]:
        pipe = snoopi_rt.load(bundle, engine="openvino", precision=f"generator={precision}")
        return lambda prompt: pipe.generate(prompt, *negative, seed=SEED).images[0]

    first, *others = dict.fromkeys(variant.precision for variant in bundle.variants("generator", "openvino"))
    loads = {OURS: partial(load, first), f"ours {first}, negative": partial(load, first, NEGATIVE)}
    return {**loads, **{f"ours {precision}, negative": partial(load, precision, NEGATIVE) for precision in others}}


def seconds(run: Callable[..., np.ndarray], *arrays: np.ndarray) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run(*arrays)
    return time.perf_counter() - start


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The measurements as lines for people."""
    lines = [f"{'':36}{'median s':>10}{'min s':>10}{'ratio':>8}{'rms error':>12}"]
    for name, row in rows.items():
        error = "-" if row["error"] is None else f"{row['error']:.2g}"
        parts = "".join(f"  {part} {value:.3f} s" for part, value in row.get("parts", {}).items())
        lines.append(f"{name:36}{row['median']:10.3f}{row['min']:10.3f}{row['ratio']:8.3f}{error:>12}{parts}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
