"""A folder of weights to a bundle: load, write graphs, measure parity, promise; in that order."""

import shutil
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from snoopi_rt import __version__
from snoopi_rt.bundle import MANIFEST, Build, Bundle, File, Latent, Scale, Text
from snoopi_rt.bundle import Guidance as GuidancePromise
from snoopi_rt.engines import installed, load_engine
from snoopi_rt.engines.base import EngineMissing, InputError
from snoopi_rt.export.backbones import Backbone, find_backbone
from snoopi_rt.export.graph import write_graph
from snoopi_rt.export.guidance import find_guidance
from snoopi_rt.export.parity import TOLERANCE, measure
from snoopi_rt.tokenizer import Tokenizer

PARITY_PROMPTS = ("", "a cat", "a blurry photo of a red apple on a blue background", "a 3d render of a rocket in the night sky")
MEASURED_ON = ("cpu", "openvino")
DYNAMIC = {
    "ids": {0: "batch", 1: "tokens"},
    "noise": {0: "batch"},
    "prompt_states": {0: "batch", 1: "tokens"},
    "prompt_mask": {0: "batch", 1: "tokens"},
    "negative_states": {0: "batch", 1: "negative_tokens"},
    "negative_mask": {0: "batch", 1: "negative_tokens"},
    "negative_scale": {0: "batch"},
    "latent": {0: "batch"},
}


def export(weights: Path, out: Path, backbone: str, guidance: str = "nasa", force: bool = False) -> Bundle:
    """Writes the student in the folder `weights` to the bundle `out` and returns it.

    Raises InputError (unknown backbone or guidance, missing weights, `out` in use), OutputError where a graph is too far from PyTorch.
    Nothing is under the name `out` until all of it is; with `force` an old bundle there is replaced.
    """
    chosen, kind = find_backbone(backbone), find_guidance(guidance)
    if out.exists() and not (force and (out / MANIFEST).exists()):
        raise InputError(f"{out} exists: choose another folder, or --force to replace it if it is a bundle")
    engines = [name for name in installed() if name in MEASURED_ON]
    if not engines:
        raise EngineMissing('export measures parity on an engine, and none is installed: pip install "snoopi-rt[export]"')
    modules = chosen.load(weights, chosen.rule)
    beside = out.with_name(f".{out.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)

    tokenizer = Tokenizer(modules.tokenizer, chosen.max_tokens, chosen.lowercase)
    ids = [torch.from_numpy(tokenizer(prompt)) for prompt in PARITY_PROMPTS]
    with torch.no_grad():
        states = [modules.text_encoder(row) for row in ids]
    cases = _generator_cases(states, chosen, with_negative=kind.attend is not None)
    reference = modules.reference(kind, states[0])
    with torch.no_grad():
        latents = reference(**cases[0])
    parts: dict[str, tuple[nn.Module, nn.Module, list[dict[str, Tensor]], str]] = {
        "text_encoder": (modules.text_encoder, modules.text_encoder, [{"ids": row.expand(2, -1)} for row in ids], "states"),
        "generator": (modules.generator(kind, states[0]).eval(), reference, cases, "latent"),
        "decoder": (modules.decoder, modules.decoder, [{"latent": latents}], "image"),
    }
    graphs: dict[str, tuple[Build, ...]] = {}
    with tqdm(total=2 * len(parts), unit="step") as bar:
        for name, (module, wanted, examples, output) in parts.items():
            path = beside / f"{name}.onnx"
            bar.set_description(f"write {name}")
            write_graph(module, examples[-1], [output], DYNAMIC, path)
            bar.update()
            bar.set_description(f"measure {name}")
            graphs[name] = (_build(name, path, wanted, examples, engines),)
            bar.update()
    shutil.copyfile(modules.tokenizer, beside / "tokenizer.json")
    bundle = Bundle(
        name=out.name,
        backbone=chosen.name,
        licence=chosen.licence,
        text=Text(File.of(beside / "tokenizer.json"), chosen.max_tokens, chosen.lowercase),
        latent=Latent(chosen.channels, chosen.factor),
        sizes=chosen.sizes,
        max_batch=64,
        guidance=GuidancePromise(kind.kind, Scale(chosen.default_scale[kind.kind], 0.0, kind.max_scale if kind.attend else 0.0), {}),
        provenance={"weights": weights.name, "exporter": f"snoopi-rt {__version__}, torch {torch.__version__}"},
        graphs=graphs,
    )
    bundle.save(beside)
    old = out.with_name(f".{out.name}.old")
    if out.exists():
        out.replace(old)
    beside.replace(out)
    shutil.rmtree(old, ignore_errors=True)
    return Bundle.load(out)


def _build(name: str, path: Path, reference: nn.Module, cases: list[dict[str, Tensor]], engines: list[str]) -> Build:
    parity = measure(name, reference, path, cases, engines)
    engine = load_engine(engines[0], path)
    promise = Build(tuple(engines), "fp32", "onnx", (File.of(path),), engine.inputs, engine.outputs, parity, TOLERANCE[name])
    engine.close()
    return promise


def _generator_cases(states: list[Tensor], backbone: Backbone, with_negative: bool) -> list[dict[str, Tensor]]:
    """Batches of 2 that differ in prompt, length, mask and scale, on real token states."""
    random = torch.Generator().manual_seed(0)
    (height, width), cases = backbone.sizes[0], []
    _, short, long, other = states
    for prompts, negatives in (((long, other), (short, short)), ((short, long), (other, short))):
        prompt, prompt_mask = _padded(prompts)
        case = {
            "noise": torch.randn(2, backbone.channels, height // backbone.factor, width // backbone.factor, generator=random),
            "prompt_states": prompt,
            "prompt_mask": prompt_mask,
        }
        if with_negative:
            case["negative_states"], case["negative_mask"] = _padded(negatives)
            case["negative_scale"] = torch.tensor([0.0, 0.7])
        cases.append(case)
    return cases


def _padded(rows: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([row.shape[1] for row in rows])
    padded = torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]
