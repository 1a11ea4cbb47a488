"""Who may import whom at module level (design.md 2)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = {"engines": "snoopi_rt.engines", "export": "snoopi_rt.export", "kernels": "snoopi_rt.kernels", "snoopi_rt": "snoopi_rt"}
MAY = {
    "engines": {"snoopi_rt.engines"},
    "kernels": {"snoopi_rt.kernels"},
    "snoopi_rt": {"snoopi_rt", "snoopi_rt.engines"},
    "export": {"snoopi_rt", "snoopi_rt.engines", "snoopi_rt.export", "snoopi_rt.kernels"},
}
TORCH_SIDE = {"torch", "diffusers", "transformers", "peft", "accelerate", "triton"}
MAY_NOT = {"engines": TORCH_SIDE, "snoopi_rt": TORCH_SIDE, "kernels": TORCH_SIDE - {"torch", "triton"}, "export": set()}


def imported(tree: ast.Module) -> set[str]:
    """Return what a module imports as it is imported itself: not inside functions, not for type checkers only."""
    names: set[str] = set()
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)
    return names


def part_of(name: str) -> str | None:
    """Return the part of the house that a name belongs to, None for a foreign package."""
    homes = [home for home in PARTS.values() if name == home or name.startswith(f"{home}.")]
    return max(homes, key=len, default=None)


def violations(part: str, source: str) -> list[str]:
    """Return the imports of a module that its part may not make."""
    wrong = []
    for name in sorted(imported(ast.parse(source))):
        home = part_of(name)
        if name.split(".")[0] in MAY_NOT[part] or (home is not None and home not in MAY[part]):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("part", PARTS)
def test_imports_go_only_where_the_arrows_do(part: str) -> None:
    found = {path: violations(part, path.read_text(encoding="utf-8")) for path in sorted((ROOT / part).rglob("*.py"))}
    assert found or part == "kernels", f"no modules in {part}"
    assert not {str(path): wrong for path, wrong in found.items() if wrong}


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("engines", "from snoopi_rt.bundle.bundle import Bundle"),
        ("engines", "from snoopi_rt import bundle"),
        ("engines", "import torch"),
        ("snoopi_rt", "try:\n    from torch.nn import Module\nexcept ImportError:\n    pass"),
        ("snoopi_rt", "from snoopi_rt.export import run"),
        ("snoopi_rt", "from snoopi_rt import export"),
        ("snoopi_rt", "class A:\n    import snoopi_rt.kernels"),
        ("kernels", "import snoopi_rt.engines.base"),
        ("kernels", "import diffusers"),
    ],
)
def test_a_planted_violation_is_found(part: str, source: str) -> None:
    assert violations(part, source)


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("snoopi_rt", "def export():\n    from snoopi_rt.export import run"),
        ("snoopi_rt", "if TYPE_CHECKING:\n    import torch"),
        ("export", "import torch\nfrom snoopi_rt.kernels import x"),
        ("engines", "from snoopi_rt.engines.base import Engine"),
    ],
)
def test_what_is_allowed_is_not_found(part: str, source: str) -> None:
    assert not violations(part, source)
