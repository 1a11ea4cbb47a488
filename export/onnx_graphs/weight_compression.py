"""How the weights of a graph are stored: fp32, fp16, or packed to 8 or 4 bits; converted one at a time, so that no second copy is held."""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

WeightFormat = Literal["fp32", "fp16", "int8", "int4"]

SMALL = 1024
"""Elements: smaller tensors (norms, biases) stay fp32."""
BLOCK = 64
"""Packed weights that share a scale."""
BITS = {"int8": 8, "int4": 4}
LARGE_TABLE = 2**28
"""Elements: a larger table (Gemma 2's has 590 million, T5-XXL's 132) would be widened to gigabytes as it is loaded."""
ROWS = 2**14
"""Of a table that are rounded at once."""


def store_transposed(graph: ir.Graph) -> None:
    """Makes every MatMul of x and Transpose(weight) one of x and a weight that is stored transposed."""
    for value in list(graph.initializers.values()):
        readers = value.consumers()
        if len(readers) == 1 and readers[0].op_type == "Transpose" and len(value.shape) == 2:
            value.const_value = _lazy(value.const_value, value.name, lambda array: np.ascontiguousarray(array.T), transposed=True)
            value.shape = value.const_value.shape
            readers[0].outputs[0].replace_all_uses_with(value)
            graph.remove(readers[0], safe=True)


def store_weights(graph: ir.Graph, weights: WeightFormat) -> None:
    """Stores all large weights in that format.

    fp32: as they are. fp16: int8 with one scale per output channel where that loses nothing, fp16 elsewhere; engines widen both as they
    load. A table read by Gather is looked up as int8 and scaled row by row instead, so that only the rows in use become floats.
    int8, int4: the weights of MatMul in blocks of 8 or 4 bits, which ONNX Runtime and OpenVINO unpack product by product; a very large
    table rounded to int8 row by row; the rest as for fp16.
    """
    if weights == "fp32":
        return
    for name, value in list(graph.initializers.items()):
        if value.dtype != ir.DataType.FLOAT or value.const_value.size < SMALL:
            continue
        readers = value.consumers()
        operators = {node.op_type for node in readers} if len(value.shape) == 2 else set()
        if operators == {"MatMul"} and weights in BITS:
            _pack(graph, readers, value, BITS[weights])
        elif operators == {"Gather"} and weights in BITS and value.const_value.size > LARGE_TABLE:
            _look_up(graph, readers, name, *_int8_rows(value.const_value.numpy()))
        elif operators == {"Gather"} and (quantised := _lossless_int8(value.const_value.numpy(), 0)):
            _look_up(graph, readers, name, *quantised)
        elif operators == {"MatMul"} and (quantised := _lossless_int8(value.const_value.numpy(), 1)):
            stored = [_constant(graph, f"{name}.int8", quantised[0]), _constant(graph, f"{name}.scale", quantised[1].reshape(-1))]
            _replace(graph, value, ir.node("DequantizeLinear", stored, {"axis": 1}))
        elif np.abs(value.const_value.numpy()).max() < np.finfo(np.float16).max:
            half = _lazy(value.const_value, f"{name}.fp16", lambda array: array.astype(np.float16), ir.DataType.FLOAT16)
            _replace(graph, value, ir.node("Cast", [_initializer(graph, half)], {"to": ir.DataType.FLOAT}))
        else:
            continue
        del graph.initializers[name]


def block_scale(weight: np.ndarray, bits: int) -> np.ndarray:
    """The scales (out, blocks) float32 of a weight (in, out), for MatMulNBits."""
    largest = torch.from_numpy(weight).abs()
    largest = nn.functional.pad(largest, (0, 0, 0, -len(weight) % BLOCK)).unflatten(0, (-1, BLOCK)).amax(1)
    return (largest.clamp(min=1e-12) / (2 ** (bits - 1) - 1)).t().contiguous().numpy()


def pack(weight: np.ndarray, bits: int) -> np.ndarray:
    """A weight (in, out) packed to (out, blocks, BLOCK * bits / 8) uint8, for MatMulNBits."""
    scale = torch.from_numpy(block_scale(weight, bits)).unsqueeze(-1)
    transposed = torch.from_numpy(weight).t().contiguous()
    blocks = nn.functional.pad(transposed, (0, -len(weight) % BLOCK)).unflatten(1, (-1, BLOCK))
    values = (blocks / scale).round_().add_(2 ** (bits - 1)).to(torch.uint8)
    return (values if bits == 8 else values[..., 0::2] | values[..., 1::2] << 4).numpy()


def _pack(graph: ir.Graph, readers: Sequence[ir.Node], value: ir.Value, bits: int) -> None:
    (inputs, outputs), source = value.const_value.shape, value.const_value
    blocks = -(-inputs // BLOCK)
    values = ir.LazyTensor(
        lambda: ir.tensor(pack(source.numpy(), bits)),
        ir.DataType.UINT8,
        ir.Shape([outputs, blocks, BLOCK * bits // 8]),
        name=f"{value.name}.steps",
    )
    scale = ir.LazyTensor(
        lambda: ir.tensor(block_scale(source.numpy(), bits).reshape(-1)),
        ir.DataType.FLOAT,
        ir.Shape([outputs * blocks]),
        name=f"{value.name}.scale",
    )
    # ONNX Runtime's 8-bit kernel is 20 times slower unless it may round the rows of x to int8 blocks; its 4-bit kernel is not.
    attributes = {"K": inputs, "N": outputs, "bits": bits, "block_size": BLOCK, "accuracy_level": 4 if bits == 8 else 0}
    packed = [_initializer(graph, values), _initializer(graph, scale)]
    graph.opset_imports["com.microsoft"] = 1
    for reader in readers:
        node = ir.node("MatMulNBits", [reader.inputs[0], *packed], attributes, domain="com.microsoft")
        graph.insert_before(reader, node)
        reader.outputs[0].replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
        graph.remove(reader, safe=True)


def _lossless_int8(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The int8 values and the scale of a matrix that was rounded to int8 along `axis` before; None of any other matrix."""
    scale = np.maximum(np.abs(values).max(1 - axis, keepdims=True), np.float32(1e-12)) / np.float32(127)
    quantised = np.rint(values / scale)
    if np.abs(quantised * scale - values).max() > 1e-6 * np.abs(values).max():
        return None
    return quantised.astype(np.int8), scale


def _lazy(
    source: ir.TensorProtocol,
    name: str,
    change: Callable[[np.ndarray], np.ndarray],
    dtype: ir.DataType | None = None,
    transposed: bool = False,
) -> ir.LazyTensor:
    """The tensor, changed when it is written."""
    shape = ir.Shape(list(source.shape)[:: -1 if transposed else 1])
    return ir.LazyTensor(lambda: ir.tensor(change(source.numpy())), dtype or source.dtype, shape, name=name)


def _constant(graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
    return _initializer(graph, ir.tensor(values, name=name))


def _initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _replace(graph: ir.Graph, value: ir.Value, node: ir.Node) -> None:
    """Puts the node before all others, and its output where the value was read."""
    graph.insert_before(graph[0], node)
    node.outputs[0].name = f"{value.name}.wide"
    value.replace_all_uses_with(node.outputs[0])


def _int8_rows(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scale of a matrix rounded to int8 row by row, without a second copy of it in floats."""
    scale, quantised = np.empty((len(values), 1), np.float32), np.empty(values.shape, np.int8)
    for start in range(0, len(values), ROWS):
        rows = slice(start, start + ROWS)
        scale[rows] = np.maximum(np.abs(values[rows]).max(1, keepdims=True), 1e-12) / 127
        quantised[rows] = np.rint(values[rows] / scale[rows])
    return quantised, scale


def _look_up(graph: ir.Graph, readers: Sequence[ir.Node], table: str, quantised: np.ndarray, scale: np.ndarray) -> None:
    stored, scales = _constant(graph, f"{table}.int8", quantised), _constant(graph, f"{table}.scale", scale)
    for reader in readers:
        ids, rows = reader.inputs[1], reader.outputs[0]
        row = ir.node("Gather", [stored, ids], {"axis": 0})
        row_scale = ir.node("Gather", [scales, ids], {"axis": 0})
        wide = ir.node("Cast", [row.outputs[0]], {"to": ir.DataType.FLOAT})
        product = ir.node("Mul", [wide.outputs[0], row_scale.outputs[0]])
        graph.insert_before(reader, [row, row_scale, wide, product])
        rows.replace_all_uses_with(product.outputs[0], replace_graph_outputs=True)
        graph.remove(reader, safe=True)
