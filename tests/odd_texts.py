"""Texts that YAML, a shell's user, argparse, a terminal or a spreadsheet could take for something else."""

from __future__ import annotations

ODD = [
    "007", "7", "1e3", "1_000", "0x10", "null", "~", "yes", "true", "False", "None", "#x", "a: b", "{}", "{a}", "[x]",
    "[/]", "- x", "-x", "-h", "--- a line", "'q'", '"q"', "!tag", "&a", "*", "@x", "%", "", " x ", "a,b", "a\nb", "😀",
    "e\u0301", "\u00e9", "2024-01-01", "\x1b[31m", "x" * 3000, "=cmd", "a=b", "\\", "?", "|", ">", "<<", ".inf",
    "12:30:45",
]  # fmt: skip
