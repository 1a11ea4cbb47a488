"""What `tools/compare.py` times beside a bundle, and the bundle's own variants: all from one folder of weights."""

import contextlib
import gc
import io
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

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
from snoopi_rt.export.presets.preset import Preset
from snoopi_rt.export.weights.checkpoint import load_module
from snoopi_rt.runtime.auto_engine import ORDER

SEED = 1
BASELINE, BF16 = "diffusers fp32", "diffusers bf16"
Run = Callable[[], np.ndarray]
Decode = Callable[[np.ndarray], np.ndarray]
Contenders = dict[str, Callable[[], Callable[..., np.ndarray]]]
"""What loads a contender, by name: it stays in memory as long as the call that it returns is held."""


def generators(bundle: Bundle, student: Path, preset: Preset, inputs: dict[str, np.ndarray], compiled: bool) -> Contenders:
    """Every way to the clean latent, by name; those of the bundle without and with the negative prompt."""
    from diffusers import PixArtTransformer2DModel, SanaTransformer2DModel, UNet2DConditionModel

    pixart, sana, rule = bundle.backbone == "pixart", bundle.backbone == "sana", preset.rule
    kind = PixArtTransformer2DModel if pixart else SanaTransformer2DModel if sana else UNet2DConditionModel
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}

    def network(dtype: torch.dtype) -> torch.nn.Module:
        loaded = load_module(student / ("transformer" if pixart or sana else "unet"), kind, dtype=dtype)
        # The prompt states are behind the caption projection already.
        if pixart:
            loaded.caption_projection = None
        if sana:
            loaded.caption_projection = loaded.caption_norm = torch.nn.Identity()
        return loaded

    def condition(loaded: torch.nn.Module, dtype: torch.dtype) -> dict[str, Any]:
        if sana:
            return {"guidance": torch.tensor([preset.embedded_guidance * loaded.config.guidance_embeds_scale])}
        kinds = size_condition(loaded, bundle.sizes[0], 1) if pixart else {}
        if bundle.backbone == "sdxl":
            kinds = {
                "text_embeds": tensors["prompt_pooled"],
                "time_ids": torch.tensor([preset.time_ids or (*bundle.sizes[0], 0.0, 0.0, *bundle.sizes[0])]),
            }
        return {"added_cond_kwargs": {name: None if value is None else value.to(dtype) for name, value in kinds.items()}} if kinds else {}

    def diffusers(dtype: torch.dtype, through: Callable[[torch.nn.Module], Callable[..., Any]] = lambda module: module) -> Run:
        loaded, states = network(dtype), tensors["prompt_states"].to(dtype)
        model, extra = through(loaded), condition(loaded, dtype)

        @torch.inference_mode()
        def run() -> np.ndarray:
            def predict(step: int, latent: torch.Tensor) -> torch.Tensor:
                timestep = torch.tensor([rule.steps[step].timestep])
                prediction = model(latent.to(dtype), encoder_hidden_states=states, timestep=timestep, return_dict=False, **extra)[0]
                return prediction[:, : latent.shape[1]].float()

            return rule.run(predict, tensors["noise"], tensors["renoise"]).numpy()

        return run

    contenders: Contenders = {BASELINE: partial(diffusers, torch.float32), BF16: partial(diffusers, torch.bfloat16)}
    if compiled:
        contenders["torch.compile bf16"] = partial(diffusers, torch.bfloat16, torch.compile)
    if not pixart and len(rule.steps) == 1:
        for name, compile_peer in (("ONNX Runtime fp32 (as optimum)", in_onnxruntime), ("OpenVINO bf16 (as optimum-intel)", in_openvino)):
            contenders[name] = partial(graph_peer, network, condition, rule, tensors["noise"], tensors["prompt_states"], compile_peer)
    # Without a negative the runtime feeds one token at scale 0.
    positive = {**inputs, "negative_states": np.zeros_like(inputs["negative_states"][:, :1]), "negative_scale": np.zeros(1, np.float32)}
    for name, load in variants(bundle, "generator").items():
        for suffix, arrays in (("", positive), (", negative", inputs)):
            contenders[f"ours {name}{suffix}"] = partial(_latent_of, load, arrays)
    return contenders


def images(bundle: Bundle, texts: tuple[str, str], generate: Contenders, decode: Contenders) -> Contenders:
    """From cached prompt states to the image; the bundle's with its first variants for OpenVINO."""

    def diffusers(name: str) -> Run:
        latent, image = generate[name](), decode[name]()
        return lambda: image(latent())

    def ours(*prompts: str) -> Run:
        pipe = snoopi_rt.load(bundle, engine="openvino", low_memory=True)
        return lambda: pipe.generate(*prompts, seed=SEED).images

    return {
        **{name: partial(diffusers, name) for name in (BASELINE, BF16)},
        "ours": partial(ours, texts[0]),
        "ours, negative": partial(ours, *texts),
    }


def graph_peer(
    network: Callable[[torch.dtype], torch.nn.Module],
    condition: Callable[[torch.nn.Module, torch.dtype], dict[str, Any]],
    rule: Any,
    noise: torch.Tensor,
    states: torch.Tensor,
    compile_peer: Callable[[Path], Callable[[dict[str, np.ndarray]], np.ndarray]],
) -> Run:
    """diffusers' network as a graph with the timestep as an input, in an engine with its own defaults."""

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network(torch.float32)
            self.extra = condition(self.network, torch.float32)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
            texts = {"encoder_hidden_states": encoder_hidden_states}
            prediction = self.network(sample, timestep=timestep, return_dict=False, **texts, **self.extra)[0]
            return prediction[:, : sample.shape[1]]

    example = {"sample": noise, "timestep": torch.tensor([rule.timestep]), "encoder_hidden_states": states}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "unet.onnx"
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(Plain().eval(), kwargs=example, input_names=list(example), dynamo=True, opset_version=18).save(
                path, external_data=True
            )
        gc.collect()
        peer = compile_peer(path)
    arrays = {name: value.numpy() for name, value in example.items()}
    return lambda: rule.run(lambda step, x_t: torch.from_numpy(peer({**arrays, "sample": x_t.numpy()})), noise).numpy()


def in_onnxruntime(path: Path) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """A session with ONNX Runtime's own choices."""
    session = import_onnxruntime().InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda arrays: session.run(None, arrays)[0]


def in_openvino(path: Path) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    """A model compiled with OpenVINO's own choices."""
    compiled = import_openvino().Core().compile_model(str(path), "CPU", {"PERFORMANCE_HINT": "LATENCY"})
    return lambda arrays: compiled(arrays)[0]


def decoders(bundle: Bundle | None, vae: Path, example: np.ndarray) -> Contenders:
    """Every way from a latent to its image, by name."""
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
        BF16: partial(eager, torch.bfloat16),
        "OpenVINO bf16 (as optimum-intel)": in_openvino,
        **{f"ours {name}": partial(ours, load) for name, load in (variants(bundle, "decoder").items() if bundle else ())},
    }


def variants(bundle: Bundle, graph: str) -> dict[str, Callable[[], Engine]]:
    """Every variant of the graph on each of its installed engines."""
    return {
        f"{engine} {variant.precision}": partial(opened, bundle, variant, engine)
        for variant in bundle.graphs[graph]
        for engine in variant.engines
        if engine in ORDER and engine in installed()
    }


def fastest(bundle: Bundle, graph: str) -> Engine:
    """The graph's first variant, on OpenVINO if it has one for it."""
    variant = bundle.variant(graph, "openvino")
    return opened(bundle, variant, max(variant.engines, key=lambda name: name == "openvino"))


def opened(bundle: Bundle, variant: Variant, engine: str) -> Engine:
    """One variant on one engine, through the cache."""
    return load_engine(engine, bundle.folder / variant.files[0].path, variant.precision, cache=Cache(), key=variant.hash)


def _latent_of(load: Callable[[], Engine], inputs: dict[str, np.ndarray]) -> Run:
    engine = load()
    arrays = {spec.name: inputs[spec.name] for spec in engine.inputs}
    return lambda: engine(**arrays)["latent"]
