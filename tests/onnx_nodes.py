"""What a written ONNX graph consists of."""

from collections import Counter
from pathlib import Path

import onnx


def node_counts(path: Path) -> Counter[str]:
    """How many nodes of each operator a graph has."""
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
