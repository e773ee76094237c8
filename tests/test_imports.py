"""Who may import whom, and how light the package is."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import prlhf_lightning

PACKAGE = Path(prlhf_lightning.__file__).parent
LEAVES = {
    "types",
    "errors",
    "paths",
    "files",
    "places",
    "modes",
    "chat_probes",
    "end_tokens",
    "model_files",
    "sqlite_file",
    "postgresql",
    "export_checksums",
    "template_limits",
    "shipped",
    "opening",
    "consent",
    "finite_numbers",
    "folders",
}
STORE = {"reference_cache", "checkpoint_files"}
ENTRY = {"checkpoint_entry"}
FEEDBACK = {"feedback_log"}
PAGES = {"pages"}
SIBLINGS = {"data", "user_models", "policies", "losses", "metrics"}
TOOLS = {"adaptation", "inference", "judges"}
MAY_IMPORT = {
    **{leaf: set() for leaf in LEAVES},
    "files": {"errors"},
    "template_limits": {"errors"},
    "chat_probes": {"template_limits"},
    "end_tokens": {"errors", "chat_probes", "template_limits"},
    "export_checksums": {"errors"},
    "shipped": {"errors"},
    "opening": {"errors"},
    "consent": {"errors"},
    "finite_numbers": {"errors"},
    "folders": {"errors", "files"},
    "places": {"errors", "model_files"},
    **{sibling: LEAVES for sibling in SIBLINGS | STORE | FEEDBACK},
    "data": LEAVES | FEEDBACK,
    "pages": LEAVES,
    "policies": LEAVES | STORE,
    "checkpoint_entry": LEAVES | {"data"},
    "modules": LEAVES | STORE | ENTRY | SIBLINGS,
    "inference": LEAVES | {"data", "user_models", "policies"},
    "loggers": LEAVES,
    "training_stats": LEAVES,
    "run_history": LEAVES | ENTRY | {"loggers", "modules"},
    "callbacks": LEAVES | SIBLINGS | {"modules", "loggers", "run_history"},
    "guards": LEAVES | SIBLINGS | {"modules"},
    "judges": LEAVES | STORE | ENTRY | SIBLINGS | {"modules"},
    "adaptation": LEAVES | SIBLINGS | {"modules"},
    "serving": LEAVES | FEEDBACK | {"inference"},
    "tasks": LEAVES | STORE | ENTRY | PAGES | SIBLINGS | TOOLS | {"modules", "callbacks", "serving"},
    "commands": set(),
    "class_arguments": set(),
    "literals": set(),
    "parser": {"commands", "class_arguments", "consent", "literals", "tasks"},
    "training": LEAVES
    | STORE
    | {"parser", "data", "user_models", "modules", "loggers", "run_history", "training_stats", "callbacks"}
    | {"guards", "tasks"},
    "cli": {"__version__", "errors", "files", "commands", "parser", "tasks", "training", "guards"},
    "__main__": {"cli"},
}


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
        assert imported(path) <= MAY_IMPORT[part] | {part}


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
