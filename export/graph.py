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
SMALL = 1024  # elements; smaller tensors (norms, biases) stay fp32


def write_graph(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]],
    path: Path,
) -> None:
    """Writes `module(**inputs)` to `path` with fp32 arithmetic.

    `dynamic`: input name to {axis: axis name}; the example needs a batch of 2, since 1 would be taken for a constant.
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
    _compact_weights(model)
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


def _matrices(model: onnx.ModelProto) -> list[tuple[int, str, np.ndarray]]:
    return [
        (i, tensor.name, numpy_helper.to_array(tensor))
        for i, tensor in enumerate(model.graph.initializer)
        if tensor.data_type == TensorProto.FLOAT and np.prod(tensor.dims) >= SMALL
    ]


def _compact_weights(model: onnx.ModelProto) -> None:
    """Stores matrices as int8 with one scale an output channel where that loses nothing, as fp16 elsewhere.

    Engines widen both as they load. A table read by Gather is looked up as int8 and scaled row by row instead, so that only the rows in
    use become floats.
    """
    readers = {name: node for node in model.graph.node for name in node.input}
    widened: list[onnx.NodeProto] = []
    lookups: dict[str, list[onnx.NodeProto]] = {}
    for i, name, values in _matrices(model):
        reader = readers[name]
        # A table has one scale a row; a MatMul's weight is (inputs, outputs).
        axis = {"Gather": 0, "MatMul": 1}.get(reader.op_type)
        rounded = None if axis is None or values.ndim != 2 else _int8(values, axis)
        if rounded is None:
            stored = numpy_helper.from_array(values.astype(np.float16), f"{name}.fp16")
            widened.append(helper.make_node("Cast", [stored.name], [name], to=TensorProto.FLOAT))
        else:
            steps, scale = rounded
            stored = numpy_helper.from_array(steps, f"{name}.int8")
            model.graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
            if axis == 0:
                lookups[reader.output[0]] = _lookup(name, reader.input[1], reader.output[0])
            else:
                widened.append(helper.make_node("DequantizeLinear", [stored.name, f"{name}.scale"], [name], axis=1))
        model.graph.initializer[i].CopyFrom(stored)
    nodes = [new for node in model.graph.node for new in lookups.get(node.output[0], [node])]
    del model.graph.node[:]
    model.graph.node.extend([*widened, *nodes])


def _int8(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps (as `values`) and scale of a matrix whose values are int8 steps along `axis` already; None of any other matrix."""
    scale = np.maximum(np.abs(values).max(1 - axis, keepdims=True), np.float32(1e-12)) / np.float32(127)
    steps = np.rint(values / scale)
    if np.abs(steps * scale - values).max() > 1e-6 * np.abs(values).max():
        return None
    return steps.astype(np.int8), scale if axis == 0 else scale.reshape(-1)


def _lookup(table: str, ids: str, rows: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Gather", [f"{table}.int8", ids], [f"{rows}.int8"], axis=0),
        helper.make_node("Gather", [f"{table}.scale", ids], [f"{rows}.scale"], axis=0),
        helper.make_node("Cast", [f"{rows}.int8"], [f"{rows}.float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{rows}.float", f"{rows}.scale"], [rows]),
    ]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its stages and warns about its own internals."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
