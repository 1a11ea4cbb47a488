"""A whole bundle of three tiny graphs whose mathematics is written twice: as ONNX and in numpy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from snoopi_rt.bundle.bundle import Bundle, File, GuidancePromise, Latent, Parity, Scale, Text, Variant
from snoopi_rt.engines import installed
from snoopi_rt.engines.base import TensorSpec

HERE = [name for name in installed() if name in ("cpu", "openvino")]
"""The engines that are installed, of those that run the bundle without a GPU."""

WORDS = ["[CLS]", "[SEP]", "[UNK]", "a", "red", "blue", "fox", "cat", "blurry", "warm"]
WIDTH, FACTOR = 4, 2
TABLE = np.random.RandomState(0).standard_normal((len(WORDS), WIDTH)).astype(np.float32)

SPECS = {
    "text_encoder": (
        [TensorSpec("ids", (None, None), "int64")],
        [TensorSpec("states", (None, None, WIDTH), "float32")],
    ),
    "generator": (
        [
            TensorSpec("noise", (None, WIDTH, None, None), "float32"),
            TensorSpec("prompt_states", (None, None, WIDTH), "float32"),
            TensorSpec("prompt_mask", (None, None), "bool"),
            TensorSpec("negative_states", (None, None, WIDTH), "float32"),
            TensorSpec("negative_mask", (None, None), "bool"),
            TensorSpec("negative_scale", (None,), "float32"),
        ],
        [TensorSpec("latent", (None, WIDTH, None, None), "float32")],
    ),
    "decoder": (
        [TensorSpec("latent", (None, WIDTH, None, None), "float32")],
        [TensorSpec("image", (None, None, None, 3), "uint8")],
    ),
}


def encode(ids: np.ndarray) -> dict[str, np.ndarray]:
    return {"states": TABLE[ids]}


def generate(**given: np.ndarray) -> dict[str, np.ndarray]:
    """noise / 4 + mean(prompt) - scale * mean(negative), the means over real tokens only."""

    def mean(states: np.ndarray, mask: np.ndarray) -> np.ndarray:
        weights = mask[..., None].astype(np.float32)
        return (states * weights).sum(1) / weights.sum(1)

    negative = mean(given["negative_states"], given["negative_mask"]) * given["negative_scale"][:, None]
    towards = mean(given["prompt_states"], given["prompt_mask"]) - negative
    return {"latent": given["noise"] * np.float32(0.25) + towards[:, :, None, None]}


def decode(latent: np.ndarray) -> dict[str, np.ndarray]:
    """The first three channels from [-2, 2] to [0, 255], each latent pixel FACTOR x FACTOR large."""
    pixels = np.clip(latent[:, :3] * np.float32(64) + np.float32(128), 0, 255)
    return {"image": pixels.transpose(0, 2, 3, 1).repeat(FACTOR, 1).repeat(FACTOR, 2).astype(np.uint8)}


FUNCTIONS: dict[str, Callable[..., dict[str, np.ndarray]]] = {"text_encoder": encode, "generator": generate, "decoder": decode}


def generator_arrays(batch: int = 2, tokens: int = 3, negative: int = 1, side: int = 4, seed: int = 7) -> dict[str, np.ndarray]:
    """Random inputs of the generator, with all tokens real."""
    stream = np.random.RandomState(seed)
    return {
        "noise": stream.standard_normal((batch, 4, side, side)).astype(np.float32),
        "prompt_states": stream.standard_normal((batch, tokens, 4)).astype(np.float32),
        "prompt_mask": np.ones((batch, tokens), bool),
        "negative_states": stream.standard_normal((batch, negative, 4)).astype(np.float32),
        "negative_mask": np.ones((batch, negative), bool),
        "negative_scale": np.full(batch, 0.5, np.float32),
    }


def onnx_graph(graph: str) -> onnx.ModelProto:
    """The same function as `FUNCTIONS[graph]`."""
    node = helper.make_node
    constants: dict[str, Any]
    if graph == "text_encoder":
        constants = {"table": TABLE}
        nodes = [node("Gather", ["table", "ids"], ["states"])]
    elif graph == "generator":
        constants = {"quarter": np.float32(0.25), "last": np.array([-1]), "tokens": np.array([1]), "pixels": np.array([2, 3])}
        nodes = []
        for side in ("prompt", "negative"):
            nodes += [
                node("Cast", [f"{side}_mask"], [f"{side}_real"], to=TensorProto.FLOAT),
                node("Unsqueeze", [f"{side}_real", "last"], [f"{side}_weights"]),
                node("Mul", [f"{side}_states", f"{side}_weights"], [f"{side}_kept"]),
                node("ReduceSum", [f"{side}_kept", "tokens"], [f"{side}_sum"], keepdims=0),
                node("ReduceSum", [f"{side}_weights", "tokens"], [f"{side}_count"], keepdims=0),
                node("Div", [f"{side}_sum", f"{side}_count"], [f"{side}_mean"]),
            ]
        nodes += [
            node("Unsqueeze", ["negative_scale", "last"], ["scale"]),
            node("Mul", ["negative_mean", "scale"], ["against"]),
            node("Sub", ["prompt_mean", "against"], ["towards"]),
            node("Unsqueeze", ["towards", "pixels"], ["everywhere"]),
            node("Mul", ["noise", "quarter"], ["soft"]),
            node("Add", ["soft", "everywhere"], ["latent"]),
        ]
    else:
        constants = {
            "begin": np.array([0]),
            "end": np.array([3]),
            "axis": np.array([1]),
            "gain": np.float32(64),
            "middle": np.float32(128),
            "low": np.float32(0),
            "high": np.float32(255),
            "factors": np.array([1, 1, FACTOR, FACTOR], np.float32),
        }
        nodes = [
            node("Slice", ["latent", "begin", "end", "axis"], ["colours"]),
            node("Mul", ["colours", "gain"], ["stretched"]),
            node("Add", ["stretched", "middle"], ["centred"]),
            node("Clip", ["centred", "low", "high"], ["pixels"]),
            node(
                "Resize",
                ["pixels", "", "factors"],
                ["large"],
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            ),
            node("Transpose", ["large"], ["ordered"], perm=[0, 2, 3, 1]),
            node("Floor", ["ordered"], ["whole"]),
            node("Cast", ["whole"], ["image"], to=TensorProto.UINT8),
        ]
    inputs, outputs = ([_value(spec, graph) for spec in side] for side in SPECS[graph])
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    model = helper.make_model(helper.make_graph(nodes, graph, inputs, outputs, weights), opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    return model


def _value(spec: TensorSpec, graph: str) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
    return helper.make_tensor_value_info(spec.name, kind, [f"{spec.name}_{axis}" if n is None else n for axis, n in enumerate(spec.shape)])


def write_tokenizer(path: Path) -> None:
    """Whole words between [CLS] and [SEP], saved with the padding and truncation that a trainer leaves behind."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    tokenizer = tokenizers.Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(WORDS[:3])
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)])
    tokenizer.enable_padding(length=16, pad_id=2, pad_token="[UNK]")
    tokenizer.enable_truncation(4)
    tokenizer.save(str(path))


def write_bundle(folder: Path) -> Bundle:
    """Writes the bundle into a new folder."""
    folder.mkdir(parents=True)
    write_tokenizer(folder / "tokenizer.json")
    for graph in SPECS:
        onnx.save(onnx_graph(graph), folder / f"{graph}.onnx")
    return Bundle(
        name="tiny",
        backbone="none",
        licence="Apache-2.0",
        text=Text(File.of(folder / "tokenizer.json"), max_tokens=6, lowercase=True),
        latent=Latent(channels=WIDTH, factor=FACTOR),
        sizes=((16, 16), (16, 24)),
        max_batch=4,
        guidance=GuidancePromise("nasa", Scale(0.5, 0.0, 1.0), {}),
        provenance={"made by": "tests/tiny_bundle.py"},
        graphs={
            graph: (
                Variant(
                    engines=("cpu", "openvino"),
                    precision="fp32",
                    format="onnx",
                    files=(File.of(folder / f"{graph}.onnx"),),
                    inputs=tuple(inputs),
                    outputs=tuple(outputs),
                    parity=Parity(0.0, 0.0),
                    tolerance=1e-4,
                ),
            )
            for graph, (inputs, outputs) in SPECS.items()
        },
    ).save(folder)
