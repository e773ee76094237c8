"""Tests are named and placed so that a stranger finds them."""

from __future__ import annotations

import ast
from pathlib import Path

import prlhf_lightning

TESTS, PACKAGE = Path(__file__).parent, Path(prlhf_lightning.__file__).parent


def test_names_of_tests_have_less_than_60_characters():
    names = [
        node.name
        for path in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    ]
    assert names
    assert [name for name in names if len(name) >= 60] == []


def test_each_folder_of_tests_is_one_of_the_package():
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    assert {str(folder) for folder in folders if not (PACKAGE / folder).is_dir()} == set()
