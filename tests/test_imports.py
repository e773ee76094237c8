"""Who may import whom, and how light the package is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import prlhf_lightning

PACKAGE = Path(prlhf_lightning.__file__).parent
# From the bottom up: a part imports those of the lines above its own, and none of its own line.
ORDER = [
    {"errors", "types"},
    {"utils"},
    {"simulation"},
    {"losses", "user_models", "policies", "metrics", "data"},
    {"model", "rewards"},
    {"inference"},
    {"online"},
    {"training"},
    {"adaptation"},
    {"analysis"},
    {"reports", "serving"},
    {"cli"},
    {"__main__"},
]
LEVEL = {part: level for level, parts in enumerate(ORDER) for part in parts}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("prlhf_lightning."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "prlhf_lightning":
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part != "__init__":
        others = imported(path) - {part, "__version__"}
        assert {other for other in others if LEVEL[other] >= LEVEL[part]} == set()


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, prlhf_lightning; print([m for m in ('torch', 'lightning', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_writing_with_a_model_needs_no_lightning():
    code = (
        "import sys, prlhf_lightning.inference; print([m for m in ('lightning', 'torchmetrics') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", [name for name in prlhf_lightning.__all__ if name != "__version__"])
def test_every_public_name_resolves(name):
    assert getattr(prlhf_lightning, name).__name__ == name
