"""The documents as tests see them: their fenced blocks, and the commands in these."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "examples/**/*.md", "patches/*.md")
    for path in ROOT.glob(pattern)
)

SHELL = {"", "bash", "sh", "console"}
"""Languages of blocks whose lines are commands; of `console` those behind a `$`."""

OTHER = {"diff", "ini", "json", "python", "text", "toml", "yaml"}

OPERATORS = {"&&", "||", ";", "|", "&", "(", ")"}
REDIRECTIONS = {">", ">>", "<", "2>", "&>"}


class Command(NamedTuple):
    """A simple command of a document.

    Attributes:
        where: document and line, for messages
        environment: the assignments in front of it
        words: without redirections
    """

    document: str
    where: str
    environment: tuple[tuple[str, str], ...]
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.words)


class Block(NamedTuple):
    """A fenced block; `line` is that of its first line of text."""

    document: str
    language: str
    line: int
    text: str


def blocks(document: str) -> list[Block]:
    """All fenced blocks, in order."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return [
        Block(document, match[2], text.count("\n", 0, match.start()) + 2, match[3])
        for match in re.finditer(r"^( *)```([^\n`]*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    ]


def commands(block: Block) -> Iterator[Command]:
    """Every simple command of a shell block."""
    text = re.sub(r"\\\n\s*", lambda found: " " + "\0", block.text)  # a line stays a line
    line = block.line
    for whole in text.split("\n"):
        shown = whole.replace("\0", "").strip()
        if block.language == "console":
            shown = shown[2:] if shown.startswith("$ ") else ""
        for words in _simple_commands(shown):
            taken = 0
            while taken < len(words) and re.fullmatch(r"[A-Z_]+=.*", words[taken]):
                taken += 1
            pairs = (word.partition("=") for word in words[:taken])
            environment = tuple((name, value) for name, _, value in pairs)
            where = f"{block.document}:{line}"
            yield Command(block.document, where, environment, tuple(words[taken:]))
        line += 1 + whole.count("\0")


def all_commands() -> list[Command]:
    """Those of all documents, in order."""
    return [
        command
        for name in NAMES
        for block in blocks(name)
        if block.language in SHELL
        for command in commands(block)
    ]


def cluster_commands() -> list[Command]:
    """Submissions of jobs, in blocks of any language: their script, then the flags behind `--`."""
    found = []
    for name in NAMES:
        for block in blocks(name):
            if "scripts/slurm/" not in block.text:
                continue
            for command in commands(block._replace(language="bash")):
                script = command.words[0] if command.words else ""
                if script.startswith("scripts/slurm/") and "--" in command.words:
                    flags = command.words[command.words.index("--") + 1 :]
                    found.append(command._replace(words=(script, *flags)))
    return found


def _simple_commands(line: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    words: list[str] = []
    skip = False
    for token in [*lexer, ";"]:
        if token in OPERATORS:
            if words:
                yield words
            words = []
        elif token in REDIRECTIONS:
            skip = True  # the file behind it
        elif skip:
            skip = False
        else:
            words.append(token)
