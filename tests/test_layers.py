"""Who may import whom at module level (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = {"engines": "snoopi_rt.engines", "export": "snoopi_rt.export", "kernels": "snoopi_rt.kernels", "snoopi_rt": "snoopi_rt"}
ERRORS = "snoopi_rt.errors"
MAY = {
    "engines": {"snoopi_rt.engines", ERRORS},
    "kernels": {"snoopi_rt.kernels"},
    "snoopi_rt": {"snoopi_rt", "snoopi_rt.engines", ERRORS},
    "export": {"snoopi_rt", "snoopi_rt.engines", "snoopi_rt.export", "snoopi_rt.kernels", ERRORS},
}
TORCH_SIDE = {"torch", "diffusers", "transformers", "peft", "accelerate", "triton"}
MAY_NOT = {"engines": TORCH_SIDE, "snoopi_rt": TORCH_SIDE, "kernels": TORCH_SIDE - {"torch", "triton"}, "export": set()}


def imported(tree: ast.Module, types: bool = False) -> set[str]:
    """Return what a module imports as it is imported itself: not inside functions; for type checkers only with `types`."""
    names: set[str] = set()
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif not types and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)
    return names


def part_of(name: str) -> str | None:
    """Return the part of the house that a name belongs to, None for a foreign package."""
    homes = [home for home in (*PARTS.values(), ERRORS) if name == home or name.startswith(f"{home}.")]
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
        ("snoopi_rt", "from snoopi_rt.export import exporter"),
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
        ("snoopi_rt", "def export():\n    from snoopi_rt.export import exporter"),
        ("snoopi_rt", "if TYPE_CHECKING:\n    import torch"),
        ("export", "import torch\nfrom snoopi_rt.kernels import x"),
        ("engines", "from snoopi_rt.engines.base import Engine"),
        ("engines", "from snoopi_rt.errors import EngineError"),
    ],
)
def test_what_is_allowed_is_not_found(part: str, source: str) -> None:
    assert not violations(part, source)


def modules() -> dict[str, set[str]]:
    """The modules of the project, each with those that it imports as it is imported itself."""
    sources = {}
    for part, package in PARTS.items():
        folder = ROOT / "kernels" / "ops" if part == "kernels" else ROOT / part
        for path in folder.rglob("*.py"):
            if part == "snoopi_rt" and path.relative_to(folder).parts[0] in ("engines", "export", "kernels"):
                continue  # the links
            names = path.relative_to(folder).with_suffix("").parts
            sources[".".join([package, *names]).removesuffix(".__init__")] = path
    graph = {}
    for module, path in sources.items():
        names = imported(ast.parse(path.read_text(encoding="utf-8")), types=module != "snoopi_rt")  # that one names what others hold
        graph[module] = {home for name in names for home in (name, name.rpartition(".")[0]) if home in sources} - {module}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Some modules that import each other, one after the other; empty where there are none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for other in sorted(graph[module]):
            if loop := visit(other, [*path, module]):
                return loop
        done.add(module)
        return []

    return next((loop for module in sorted(graph) if (loop := visit(module, []))), [])


def test_no_modules_import_each_other() -> None:
    graph = modules()
    assert len(graph) > 150 and "snoopi_rt.kernels.nasa" in graph
    assert not circle(graph)


def test_no_shelves_of_the_runtime_import_each_other() -> None:
    shelves: dict[str, set[str]] = {}
    for module, others in modules().items():
        names = {".".join(name.split(".")[:2]) for name in (module, *others)} - {"snoopi_rt"}
        if module != "snoopi_rt":
            shelf = ".".join(module.split(".")[:2])
            shelves.setdefault(shelf, set()).update(names - {shelf})
    assert len(shelves) > 15 and "snoopi_rt.server" in shelves
    assert not circle(shelves)


def test_a_planted_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
