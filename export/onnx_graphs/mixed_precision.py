"""A graph with fp16 or bf16 arithmetic for engines on a GPU, whose precision is what the file says: TensorRT is strongly typed.

Made of the graph whose weights are stored in fp16, and reads its file of weights. Inputs and outputs stay float32, and so does what turns
a network's answer into its output: sigma / alpha is 157 for PixArt at t = 999, and levels of 255 are no fp16.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from snoopi_rt.errors import InputError

Half = Literal["fp16", "bf16"]
WIDE, STORED = TensorProto.FLOAT, TensorProto.FLOAT16
KINDS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
LAST = {"Add", "Sub", "Mul", "Div", "Clip", "Round", "Cast", "Transpose"}
"""Operators that an output is made with of a network's answer."""
WIDE_INPUTS = {"Resize": (1, 2), "Range": (0, 1, 2)}
"""Inputs that must be float32 whatever the others are: regions and factors."""


def half_arithmetic(path: Path, out: Path, half: Half = "fp16") -> None:
    """Writes the graph in `path` with such arithmetic to `out`, beside it.

    Raises InputError for one that computes with integers, as the small text encoder does: TensorRT has them before DequantizeLinear only.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    integers = {value.name for value in graph.initializer if value.data_type in (TensorProto.INT8, TensorProto.UINT8)}
    if any(integers.intersection(node.input) for node in graph.node if node.op_type != "DequantizeLinear"):
        raise InputError("its int8 weights are read by other operators than DequantizeLinear")
    last = _last(graph)
    kinds = _kinds(model)
    halves = _Halves(graph, kinds, KINDS[half], path.parent)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.output[0] in last:
            for place, name in enumerate(node.input):
                if name in halves.made:
                    node.input[place], added = halves.widened(name)
                    nodes += added
            nodes.append(node)
        elif not halves.takes_stored(node):
            for place, name in enumerate(node.input):
                if kinds.get(name) == WIDE and place not in WIDE_INPUTS.get(node.op_type, ()):
                    node.input[place], added = halves.narrowed(name)
                    nodes += added
            halves.retype(node)
            halves.made.update(name for name in node.output if kinds.get(name) == WIDE)
            nodes.append(node)
    for output in graph.output:
        if output.name in halves.made:
            nodes += halves.output(output.name, nodes)
    _drop_unread(graph, nodes)
    out.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(out), full_check=True)


def rounded(path: Path, out: Path) -> None:
    """Writes a graph with half arithmetic, in `path`, as one that any engine runs alike to `out`, beside it.

    Operators are fp32 and their outcome is rounded to the half type: what a GPU does, whose sums are fp32. ONNX Runtime's CPU has few
    operators in fp16 and does not round between the others.
    """
    model = onnx.load(path, load_external_data=False)
    graph, kinds = model.graph, _kinds(model)
    narrow = {name: kind for name, kind in kinds.items() if kind in KINDS.values()}
    nodes = [
        helper.make_node("Cast", [value.name], [f"{value.name}.rounded"], to=WIDE) for value in graph.initializer if value.name in narrow
    ]
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in narrow:
                node.input[place] = f"{name}.rounded"
        _retyped(node, WIDE)
        nodes.append(node)
        for name in set(node.output) & narrow.keys():
            nodes.append(helper.make_node("Cast", [name], [f"{name}.narrow"], to=narrow[name]))
            nodes.append(helper.make_node("Cast", [f"{name}.narrow"], [f"{name}.rounded"], to=WIDE))
    _drop_unread(graph, nodes)
    out.write_bytes(model.SerializeToString(deterministic=True))


class _Halves:
    """Which tensors are of the half type by now, and casts between the two types, each made once."""

    def __init__(self, graph: onnx.GraphProto, kinds: dict[str, int], half: int, folder: Path):
        self.graph, self.kinds, self.half, self.folder = graph, kinds, half, folder
        self.made: set[str] = set()
        self.constants = {value.name: value for value in graph.initializer}
        self.names: dict[str, str] = {}

    def takes_stored(self, node: onnx.NodeProto) -> bool:
        """Whether the node only widens a weight that is stored in fp16, and the half type is that: its readers get the weight itself."""
        stored = self.constants.get(node.input[0]) if node.op_type == "Cast" else None
        if stored is None or stored.data_type != self.half:
            return False
        self.names[node.output[0]] = stored.name
        return True

    def narrowed(self, name: str) -> tuple[str, list[onnx.NodeProto]]:
        """The half tensor of a float32 one, and what makes it."""
        if name in self.made:
            return name, []
        if name in self.names:
            return self.names[name], []
        self.names[name] = narrow = f"{name}.half"
        constant = self.constants.get(name)
        if constant is None:
            return narrow, [helper.make_node("Cast", [name], [narrow], narrow, to=self.half)]
        values = numpy_helper.to_array(constant, base_dir=str(self.folder))
        self.graph.initializer.append(numpy_helper.from_array(_halved(values, self.half), narrow))
        return narrow, []

    def widened(self, name: str) -> tuple[str, list[onnx.NodeProto]]:
        """The float32 tensor of a half one, and what makes it."""
        wide = f"{name}.wide"
        if wide in self.names:
            return wide, []
        self.names[wide] = name
        return wide, [helper.make_node("Cast", [name], [wide], wide, to=WIDE)]

    def output(self, name: str, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
        """Makes an output float32 again, whose maker gives the half type now."""
        narrow = f"{name}.half"
        for node in nodes:
            for names in (node.input, node.output):
                for place, each in enumerate(names):
                    if each == name:
                        names[place] = narrow
        return [helper.make_node("Cast", [narrow], [name], f"{name}.wide", to=WIDE)]

    def retype(self, node: onnx.NodeProto) -> None:
        """Float32 constants and casts of a node become half ones."""
        _retyped(node, self.half)


def _last(graph: onnx.GraphProto) -> set[str]:
    """What the nodes between a network's answer and the outputs make."""
    makers = {name: node for node in graph.node for name in node.output}
    found: set[str] = set()
    todo = [value.name for value in graph.output]
    while todo:
        node = makers.get(todo.pop())
        if node is not None and node.op_type in LAST and node.output[0] not in found:
            found.add(node.output[0])
            todo += node.input
    return found


def _kinds(model: onnx.ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.input, *graph.output]}
    return kinds | {value.name: value.data_type for value in graph.initializer}


def _retyped(node: onnx.NodeProto, kind: int) -> None:
    """Float constants and casts of a node get that type."""
    for attribute in node.attribute:
        if attribute.name == "to" and attribute.i in (WIDE, *KINDS.values()):
            attribute.i = kind
        elif attribute.name == "value" and attribute.t.data_type in (WIDE, *KINDS.values()):
            attribute.t.CopyFrom(numpy_helper.from_array(_halved(numpy_helper.to_array(attribute.t), kind)))
        elif attribute.name in ("value_float", "value_floats"):
            values = np.array(list(attribute.floats) or attribute.f, np.float32)
            attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(_halved(values, kind))))


def _halved(values: np.ndarray, kind: int) -> np.ndarray:
    """The values in a type. What it has no number for is cut: a mask's lowest fp32 number would be minus infinity, and its row NaN."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    largest = float(ml_dtypes.finfo(dtype).max)
    return np.clip(values.astype(np.float32), -largest, largest).astype(dtype)


def _drop_unread(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Leaves the nodes and constants that an output needs."""
    read = {value.name for value in graph.output}
    kept = list(_read(nodes, read))
    del graph.node[:]
    graph.node.extend(reversed(kept))
    constants = [value for value in graph.initializer if value.name in read]
    del graph.initializer[:]
    graph.initializer.extend(constants)
    del graph.value_info[:]


def _read(nodes: list[onnx.NodeProto], read: set[str]) -> Iterator[onnx.NodeProto]:
    for node in reversed(nodes):
        if read.intersection(node.output):
            read.update(node.input)
            yield node
