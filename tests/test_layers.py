"""Calls go one way: no module of the package imports from a layer above its own, at its top or inside a function."""

from __future__ import annotations

import ast
from pathlib import Path

import fastconv

ROOT = Path(fastconv.__file__).parent
# From the lowest to the highest; a module not named here stands above them all.
LAYERS = [
    {"_version", "_ext", "_checks", "_autocast", "_cache", "reference"},
    {"_measured", "triton"},
    {"ops"},
    {"autograd"},
    {"_losses", "_pooling"},
    {"functional"},
    {"nn", "_fuse"},
    {"fuse"},
]


def layer(module: str) -> int:
    return next((i for i, names in enumerate(LAYERS) if module in names), len(LAYERS))


def imported(path: Path):
    """The package's own modules, by their first name, that a file imports anywhere in it."""
    depth = len(path.relative_to(ROOT).parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from [node.module.partition(".")[0]] if node.module else [a.name for a in node.names]


def test_no_layer_imports_upwards():
    seen = set()
    for path in sorted(ROOT.rglob("*.py")):
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for name in imported(path):
            seen.add((own, name))
            assert layer(name) <= layer(own), f"{path.relative_to(ROOT)} imports {name}, which is above it"
    assert {("triton", "_measured"), ("ops", "triton"), ("functional", "ops"), ("nn", "functional")} <= seen
