"""A graph with fp16 or bf16 arithmetic for GPU engines, whose precision is what the file says: TensorRT is strongly typed.

It is converted from the graph whose weights are stored in fp16, and reads that one's weights. Inputs and outputs stay float32, and so do
the operators between the network's own output and the graph's: sigma / alpha is 157 for PixArt at t = 999, and an image's levels need more
than the 8 bits of bf16.
"""

from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from snoopi_rt.errors import InputError
from snoopi_rt.export.onnx_graphs.engine_rewrites import keep_needed

GpuPrecision = Literal["fp16", "bf16"]
FLOAT32 = TensorProto.FLOAT
DTYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
FLOATS = (FLOAT32, *DTYPES.values())
POSTPROCESSING = {"Add", "Sub", "Mul", "Div", "Clip", "Round", "Cast", "Transpose"}
"""Operators that make the graph's output of the network's own."""
FLOAT32_INPUTS = {"Resize": (1, 2), "Range": (0, 1, 2)}
"""Places of inputs that must be float32 whatever the others are: regions and factors."""


def to_gpu_precision(path: Path, out: Path, precision: GpuPrecision = "fp16") -> None:
    """Writes the graph in `path` with arithmetic of that precision to `out`, which must be beside it.

    Raises InputError for a graph that computes with integers, as the small text encoder does: TensorRT takes them only before
    DequantizeLinear.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    integers = {value.name for value in graph.initializer if value.data_type in (TensorProto.INT8, TensorProto.UINT8)}
    if any(integers.intersection(node.input) for node in graph.node if node.op_type != "DequantizeLinear"):
        raise InputError("its int8 weights are read by other operators than DequantizeLinear")
    postprocessing = _postprocessing(graph)
    dtypes = _dtypes(model)
    casts = _Casts(graph, dtypes, DTYPES[precision], path.parent)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.output[0] in postprocessing:
            for place, name in enumerate(node.input):
                if name in casts.narrow:
                    node.input[place], added = casts.widened(name)
                    nodes += added
            nodes.append(node)
        elif not casts.reads_stored_weight(node):
            for place, name in enumerate(node.input):
                if dtypes.get(name) == FLOAT32 and place not in FLOAT32_INPUTS.get(node.op_type, ()):
                    node.input[place], added = casts.narrowed(name)
                    nodes += added
            _retype(node, casts.dtype)
            casts.narrow.update(name for name in node.output if dtypes.get(name) == FLOAT32)
            nodes.append(node)
    for output in graph.output:
        if output.name in casts.narrow:
            nodes += casts.output(output.name, nodes)
    _drop_unread(graph, nodes)
    out.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(out), full_check=True)


def simulate_gpu(path: Path, out: Path) -> None:
    """Writes the graph in `path`, made by to_gpu_precision, to `out`, beside it, in a form that every engine computes as a GPU does.

    Operators are fp32 and their outputs are rounded to the narrow type, as on a GPU, which sums in fp32. ONNX Runtime's CPU has few
    operators in fp16 and does not round between the others.
    """
    model = onnx.load(path, load_external_data=False)
    graph, dtypes = model.graph, _dtypes(model)
    narrow = {name: dtype for name, dtype in dtypes.items() if dtype in DTYPES.values()}
    nodes = [
        helper.make_node("Cast", [value.name], [f"{value.name}.rounded"], to=FLOAT32) for value in graph.initializer if value.name in narrow
    ]
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in narrow:
                node.input[place] = f"{name}.rounded"
        _retype(node, FLOAT32)
        nodes.append(node)
        for name in set(node.output) & narrow.keys():
            nodes.append(helper.make_node("Cast", [name], [f"{name}.narrow"], to=narrow[name]))
            nodes.append(helper.make_node("Cast", [f"{name}.narrow"], [f"{name}.rounded"], to=FLOAT32))
    _drop_unread(graph, nodes)
    out.write_bytes(model.SerializeToString(deterministic=True))


class _Casts:
    """The tensors that are of the narrow type so far (`narrow`), and the casts between it and float32, each made once."""

    def __init__(self, graph: onnx.GraphProto, dtypes: dict[str, int], dtype: int, folder: Path):
        self.graph, self.dtypes, self.dtype, self.folder = graph, dtypes, dtype, folder
        self.narrow: set[str] = set()
        self.constants = {value.name: value for value in graph.initializer}
        self.cast: dict[str, str] = {}

    def reads_stored_weight(self, node: onnx.NodeProto) -> bool:
        """Whether the node only widens a weight that is stored in the narrow type: then its readers get the weight itself."""
        weight = self.constants.get(node.input[0]) if node.op_type == "Cast" else None
        if weight is None or weight.data_type != self.dtype:
            return False
        self.cast[node.output[0]] = weight.name
        return True

    def narrowed(self, name: str) -> tuple[str, list[onnx.NodeProto]]:
        """The narrow tensor of a float32 one, and the nodes that make it."""
        if name in self.narrow:
            return name, []
        if name in self.cast:
            return self.cast[name], []
        self.cast[name] = narrow = f"{name}.half"
        constant = self.constants.get(name)
        if constant is None:
            return narrow, [helper.make_node("Cast", [name], [narrow], narrow, to=self.dtype)]
        values = numpy_helper.to_array(constant, base_dir=str(self.folder))
        self.graph.initializer.append(numpy_helper.from_array(_converted(values, self.dtype), narrow))
        return narrow, []

    def widened(self, name: str) -> tuple[str, list[onnx.NodeProto]]:
        """The float32 tensor of a narrow one, and the nodes that make it."""
        wide = f"{name}.wide"
        if wide in self.cast:
            return wide, []
        self.cast[wide] = name
        return wide, [helper.make_node("Cast", [name], [wide], wide, to=FLOAT32)]

    def output(self, name: str, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """The nodes that make an output of the graph float32 again, after the node that computes it gives the narrow type."""
        narrow = f"{name}.half"
        for node in nodes:
            for names in (node.input, node.output):
                for place, other in enumerate(names):
                    if other == name:
                        names[place] = narrow
        return [helper.make_node("Cast", [narrow], [name], f"{name}.wide", to=FLOAT32)]


def _postprocessing(graph: onnx.GraphProto) -> set[str]:
    """The outputs of the nodes between the network's own output and the graph's."""
    producers = {name: node for node in graph.node for name in node.output}
    names: set[str] = set()
    pending = [value.name for value in graph.output]
    while pending:
        node = producers.get(pending.pop())
        if node is not None and node.op_type in POSTPROCESSING and node.output[0] not in names:
            names.add(node.output[0])
            pending += node.input
    return names


def _dtypes(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    dtypes = {value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.input, *graph.output]}
    return dtypes | {value.name: value.data_type for value in graph.initializer}


def _retype(node: onnx.NodeProto, dtype: int) -> None:
    """Gives the floating-point constants and casts of a node that type."""
    for attribute in node.attribute:
        if attribute.name == "to" and attribute.i in FLOATS:
            attribute.i = dtype
        elif attribute.name == "value" and attribute.t.data_type in FLOATS:
            attribute.t.CopyFrom(numpy_helper.from_array(_converted(numpy_helper.to_array(attribute.t), dtype)))
        elif attribute.name in ("value_float", "value_floats"):
            values = np.array(list(attribute.floats) or attribute.f, np.float32)
            attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(_converted(values, dtype))))


def _converted(values: np.ndarray, dtype: int) -> np.ndarray:
    """The values in an ONNX type, clipped to its range: a mask's lowest fp32 number would become minus infinity, and its row NaN."""
    target = helper.tensor_dtype_to_np_dtype(dtype)
    largest = float(ml_dtypes.finfo(target).max)
    return np.clip(values.astype(np.float32), -largest, largest).astype(target)


def _drop_unread(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Makes `nodes` the graph's, without the nodes and constants that no output needs."""
    read = keep_needed(graph, nodes)
    constants = [value for value in graph.initializer if value.name in read]
    del graph.initializer[:]
    graph.initializer.extend(constants)
    del graph.value_info[:]
