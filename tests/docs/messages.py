"""What the code can say: every text literal of it, with a hole where a value goes in."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("megatron_rlhfuse/**/*.py", "scripts/**/*.py", "pretrain_rlhf.py", "setup.py")
SHELL = ("scripts/**/*.sh", "scripts/**/*.sbatch")

HOLE = "\0"


@cache
def texts() -> tuple[str, ...]:
    """Of Python one text per literal or f-string, of a shell script the whole as one text."""
    found = []
    for pattern in SOURCES:
        for path in ROOT.glob(pattern):
            found += _literals(ast.parse(path.read_text(encoding="utf-8")))
    for pattern in SHELL:
        for path in ROOT.glob(pattern):
            script = path.read_text(encoding="utf-8")
            script = re.sub(r'" *\\\n *"', " ", script)  # arguments that echo joins
            script = script.replace('\\"', '"')
            found.append(re.sub(r"\$\{[^}]*\}|\$\w+|\$\([^)]*\)", HOLE, script))
    return tuple(found)


def is_said(message: str) -> bool:
    """Whether some text has all parts of `message`, in order; `…` in it stands for values."""
    parts = [re.escape(part) for part in message.split("…") if part]
    pattern = re.compile("(?:.|\n)*?".join(parts))
    return any(pattern.search(text) for text in texts())


def _literals(tree: ast.Module) -> Iterator[str]:
    comments = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if node in comments:  # a docstring is not said to anybody
            continue
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                part.value
                if isinstance(part, ast.Constant) and isinstance(part.value, str)
                else HOLE
                for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%[sdgr]", HOLE, node.value)
