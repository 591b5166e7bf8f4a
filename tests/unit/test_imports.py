"""Imports point one way: kernels <- engine <- rlhf <- bench. Read from the syntax trees, imports inside functions
included."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LADDER = ["kernels", "engine", "rlhf", "bench"]
SMALL = {"torch", "triton", "numpy", "safetensors"} | sys.stdlib_module_names
FILES = [path for folder in LADDER for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_modules(path: Path) -> list[str]:
    """Absolute names of the modules that a file imports; ours begin with "megalith."."""
    package = ["megalith", *path.relative_to(ROOT).parent.parts]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(node.module)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            names += [".".join([*base, alias.name]) for alias in node.names]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_imported_from_above(path):
    folder = path.relative_to(ROOT).parts[0]
    allowed = LADDER[: LADDER.index(folder) + 1]
    for name in imported_modules(path):
        if name.split(".")[0] == "megalith":
            assert name.split(".")[1] in allowed, f"{path} imports {name}"


@pytest.mark.parametrize("path", [p for p in FILES if p.relative_to(ROOT).parts[0] in ("kernels", "engine")], ids=str)
def test_engine_and_kernels_need_few_packages(path):
    for name in imported_modules(path):
        assert name.split(".")[0] in SMALL | {"megalith"}, f"{path} imports {name}"


def test_files_of_the_engine_import_each_other_without_cycles():
    files = {path.stem: path for path in FILES if path.parent.name == "engine" and path.stem != "__init__"}
    waiting = {
        stem: {name.split(".")[2] for name in imported_modules(path) if name.startswith("megalith.engine.")}
        & set(files)
        for stem, path in files.items()
    }
    while waiting:
        free = [stem for stem, needs in waiting.items() if not needs & waiting.keys()]
        assert free, f"a cycle among {sorted(waiting)}"
        for stem in free:
            del waiting[stem]


def test_transformers_is_imported_from_the_repository_s_root():
    """It looks for a package called `kernels`, and finds ours there."""
    command = [sys.executable, "-c", "import megalith.kernels; from transformers import LlamaConfig"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
