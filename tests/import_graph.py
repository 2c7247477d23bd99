#!/usr/bin/env python3
"""Who imports whom: `python tests/import_graph.py` prints every module with what it imports, the highest first.

Imports inside functions count as well, and so do the modules that a package names in `exports`. A module stands one
floor above the highest one that it imports.
"""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENTRY = ("test_quant", "test_kt")
PACKAGES = ("inversion", "quant", "kt", "models", "utils", "scripts")


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Every module of the product by its dotted name."""
    files = [root / f"{name}.py" for name in ENTRY]
    for package in PACKAGES:
        files += sorted((root / package).rglob("*.py"))
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def import_graph(root: Path = ROOT) -> dict[str, set[str]]:
    """The modules of the product that each of them names in an import."""
    known = modules(root)
    return {name: imported(file, known.keys()) - {name} for name, file in known.items()}


def imported(file: Path, known) -> set[str]:
    """Those of the `known` modules that a file imports, by the longest name that is one."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "exports":
            names |= {home.value for home in node.args[1].keys}
    parts = ({name, name.rpartition(".")[0]} for name in names)
    return {max(found, key=len) for part in parts if (found := part & set(known))}


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each module, 0 for one that imports none. Raises `graphlib.CycleError` where there is a circle."""
    found: dict[str, int] = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        found[name] = 1 + max((found[other] for other in graph[name]), default=-1)
    return found


def main() -> None:
    """Print the graph."""
    graph = import_graph()
    for name, floor in sorted(floors(graph).items(), key=lambda item: (-item[1], item[0])):
        print(f"{floor:2d}  {name}: {', '.join(sorted(graph[name])) or '-'}")


if __name__ == "__main__":
    main()
