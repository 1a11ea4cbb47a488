"""One torch module to one ONNX file: named inputs and axes, compact weights, and no trace of the machine that wrote it."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript import optimizer
from torch import Tensor, nn

from snoopi_rt.export.onnx_graphs.weight_compression import SMALL, WeightFormat, store_transposed, store_weights

OPSET = 23
"""The first with the operator Attention."""


def write_graph(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]],
    path: Path,
    weights: WeightFormat = "fp32",
    opset: int = OPSET,
    tensor_of: Callable[[str], Tensor] | None = None,
) -> list[Path]:
    """Writes `module(**inputs)` to `path` with fp32 arithmetic; returns the files written, `path` first, its weights second.

    `inputs`: an example by name, of batch 2, since 1 would be taken for a constant. `dynamic`: input name to {axis: axis name}. `weights`:
    how matrices are stored, see weight_compression.py. `tensor_of`: gives the tensors of a module on the meta device by name; they are read
    one by one as the file is written.
    """
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module.eval(),
            kwargs=dict(inputs),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes={name: dict.fromkeys(dynamic.get(name, {}), torch.export.Dim.DYNAMIC) for name in inputs},
            opset_version=opset,
            dynamo=True,
            optimize=tensor_of is None,  # the optimiser computes with the tensors
        )
    model = program.model
    if tensor_of is not None:
        optimizer.inline(model)
        for name, value in model.graph.initializers.items():
            if value.const_value.raw.is_meta:
                value.const_value = _lazy_tensor(tensor_of, name, value)
        store_transposed(model.graph)
    else:
        _share_views(model.graph)
    _name_axes(model.graph, dynamic)
    # Stack traces and absolute paths of the exporting machine.
    ClearMetadataAndDocStringPass()(model)
    store_weights(model.graph, weights)
    data = path.with_name(f"{path.name}.data")
    ir.save(model, path, external_data=data.name, size_threshold_bytes=SMALL)
    onnx.checker.check_model(str(path), full_check=True)
    return [path, data] if data.exists() else [path]


def _lazy_tensor(tensor_of: Callable[[str], Tensor], name: str, value: ir.Value) -> ir.LazyTensor:
    def read() -> ir.Tensor:
        tensor = tensor_of(name)
        return ir.tensor((tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy())

    return ir.LazyTensor(read, value.dtype, value.shape, name=name)


def _share_views(graph: ir.Graph) -> None:
    """Leaves one of all initializers that are views of the same memory: each step of a student transposes its matrices again."""
    arrays = {name: value.const_value.numpy() for name, value in graph.initializers.items() if value.const_value.size}
    first: dict[tuple, ir.Value] = {}
    for name, array in arrays.items():
        value = graph.initializers[name]
        shared = first.setdefault((array.ctypes.data, array.shape, array.strides, array.dtype), value)
        if shared is not value:
            value.replace_all_uses_with(shared)
            del graph.initializers[name]


def _name_axes(graph: ir.Graph, dynamic: Mapping[str, Mapping[int, str]]) -> None:
    renamed: dict[str, str] = {}
    for value in graph.inputs:
        for axis, name in dynamic.get(value.name, {}).items():
            renamed[str(value.shape[axis])] = name
    for value in [*graph.inputs, *graph.outputs]:
        value.shape = ir.Shape([dim if isinstance(dim, int) else renamed.get(str(dim), str(dim)) for dim in value.shape])
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None  # it still has the old names, and engines infer shapes themselves


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter, which prints its progress and warns about its own internals."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
