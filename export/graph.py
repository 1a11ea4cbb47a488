"""One torch module to one ONNX file: names, dynamic axes, compact weights, and nothing of the machine that wrote it."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

OPSET = 20  # the first with Gelu and LayerNormalization both; 23 fuses attention, which pays only for long token rows
INT8, FP16 = "int8", "fp16"
SMALL = 1024  # elements; smaller tensors (norms, biases) stay fp32


def write_graph(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]],
    path: Path,
    weights: str,
) -> None:
    """Writes `module(**inputs)` to `path` with fp32 arithmetic.

    `dynamic`: input name to {axis: axis name}; the example needs a batch of 2, since 1 would be taken for a constant. `weights` says how
    matrices lie in the file: fp16 (half the size, widened as the engine loads) or int8 a row (symmetric, for weights already rounded so).
    """
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module.eval(),
            kwargs=dict(inputs),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes={name: dict.fromkeys(dynamic.get(name, {}), torch.export.Dim.DYNAMIC) for name in inputs},
            opset_version=OPSET,
            dynamo=True,
            optimize=True,
        )
    model = program.model_proto
    _name_axes(model, dynamic)
    _forget_origin(model)
    {INT8: _int8_weights, FP16: _fp16_weights}[weights](model)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def node_counts(path: Path) -> dict[str, int]:
    """How many nodes of each operator a graph has."""
    counts: dict[str, int] = {}
    for node in onnx.load(path).graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def _name_axes(model: onnx.ModelProto, dynamic: Mapping[str, Mapping[int, str]]) -> None:
    renamed: dict[str, str] = {}
    for value in model.graph.input:
        for axis, name in dynamic.get(value.name, {}).items():
            renamed[value.type.tensor_type.shape.dim[axis].dim_param] = name
    for value in [*model.graph.input, *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = renamed.get(dim.dim_param, dim.dim_param)
    del model.graph.value_info[:]  # it still has the old names, and engines infer shapes themselves


def _forget_origin(model: onnx.ModelProto) -> None:
    """Drops stack traces and absolute paths of the exporting machine."""
    del model.metadata_props[:]
    model.doc_string = ""
    model.graph.doc_string = ""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]
    for value in [*model.graph.input, *model.graph.output]:
        del value.metadata_props[:]
    del model.graph.metadata_props[:]


def _matrices(model: onnx.ModelProto) -> Iterator[tuple[int, TensorProto, np.ndarray]]:
    for i, tensor in enumerate(model.graph.initializer):
        if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) >= SMALL:
            yield i, tensor, numpy_helper.to_array(tensor)


def _fp16_weights(model: onnx.ModelProto) -> None:
    """Stores matrices as fp16 behind a Cast, which engines fold when they load."""
    casts = []
    for i, tensor, values in list(_matrices(model)):
        stored = f"{tensor.name}.fp16"
        casts.append(helper.make_node("Cast", [stored], [tensor.name], to=TensorProto.FLOAT))
        model.graph.initializer[i].CopyFrom(numpy_helper.from_array(values.astype(np.float16), stored))
    _prepend(model, casts)


def _int8_weights(model: onnx.ModelProto) -> None:
    """Stores matrices as int8 with one scale an output channel.

    A table read by Gather is looked up as int8 and scaled row by row, so that only the rows in use become floats.
    """
    readers = {name: node for node in model.graph.node for name in node.input}
    opened, nodes = [], []
    replaced: dict[str, list[onnx.NodeProto]] = {}
    for i, tensor, values in list(_matrices(model)):
        reader = readers[tensor.name]
        if values.ndim != 2 or reader.op_type not in ("Gather", "MatMul"):
            continue
        axis = 0 if reader.op_type == "Gather" else 1  # a MatMul's weight is (inputs, outputs)
        scale = np.maximum(np.abs(values).max(1 - axis, keepdims=True), 1e-12) / np.float32(127)
        steps = np.rint(values / scale).astype(np.int8)
        stored, scales = f"{tensor.name}.int8", f"{tensor.name}.scale"
        model.graph.initializer[i].CopyFrom(numpy_helper.from_array(steps, stored))
        if reader.op_type == "Gather":
            opened.append(numpy_helper.from_array(scale, scales))
            rows = reader.output[0]
            ids = reader.input[1]
            replaced[reader.name] = [
                helper.make_node("Gather", [stored, ids], [f"{rows}.int8"], axis=0),
                helper.make_node("Gather", [scales, ids], [f"{rows}.scale"], axis=0),
                helper.make_node("Cast", [f"{rows}.int8"], [f"{rows}.float"], to=TensorProto.FLOAT),
                helper.make_node("Mul", [f"{rows}.float", f"{rows}.scale"], [rows]),
            ]
        else:
            opened.append(numpy_helper.from_array(scale.reshape(-1), scales))
            nodes.append(helper.make_node("DequantizeLinear", [stored, scales], [tensor.name], axis=1))
    model.graph.initializer.extend(opened)
    rest = [new for node in model.graph.node for new in replaced.get(node.name, [node])]
    del model.graph.node[:]
    model.graph.node.extend(rest)
    _prepend(model, nodes)


def _prepend(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> None:
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its stages and warns about its own internals."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
