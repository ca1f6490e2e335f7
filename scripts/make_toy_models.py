"""Makes the toy input of demo, tests and benchmarks: an actor, a reward model and prompts.

    python scripts/make_toy_models.py --output DIR [--seed N] [--prompts N]

trains for about a minute on 2 CPU cores and writes
    DIR/actor          a small Llama whose answers differ in length as real ones do
    DIR/reward         the same trunk with a scalar head, trained on preference pairs
    DIR/prompts.jsonl  plain prompts and chats, each with its topic
    DIR/toy.json       settings and everything measured
Both models come with the tokenizer.

Invariants:
- DIR appears complete or not at all, and nothing is overwritten that this script did not write;
- a second call with the same settings and the same script does nothing;
- the same seed gives the same weights on the same kind of machine;
- what was promised is measured on samples of the trained actor, and a miss is an error.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toy.corpus import questions, render_prompt, topic_of

MAX_PROMPTS = len(list(questions()))
CHAT_EVERY = 4
"""Every fourth prompt is a chat; the others are plain text."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves the scratch folder removed
    key = {"seed": options.seed, "prompts": options.prompts, "script_sha256": script_hash()}
    if cached_key(options.output) == key:
        print(f"{options.output} is up to date")
        return 0
    refuse_foreign(options.output)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".toy-", dir=options.output.parent) as scratch:
        built = Path(scratch) / "built"
        built.mkdir()
        write_prompts(built / "prompts.jsonl", options.prompts, options.seed)
        # On busy cores OpenMP's spinning threads take twenty times as long as waiting ones.
        # It is read when torch is first imported, which a cached call need not wait for.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from toy.build import build_models

        measured = build_models(built, options.seed)
        (built / "toy.json").write_text(json.dumps({**key, **measured}, indent=2) + "\n")
        if cached_key(options.output) != key:  # nobody else has made it meanwhile
            if options.output.exists():
                options.output.rename(Path(scratch) / "old")
            built.rename(options.output)
    print(f"wrote {options.output}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Makes the toy actor, reward model and prompts.")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="seed of text and weights")
    parser.add_argument("--prompts", type=int, default=512, help="lines of prompts.jsonl")
    options = parser.parse_args(arguments)
    if not 1 <= options.prompts <= MAX_PROMPTS:
        parser.error(
            f"--prompts is {options.prompts}; the toy language has 1 to {MAX_PROMPTS} of them"
        )
    return options


def script_hash() -> str:
    """SHA-256 of this script and its parts: a change of any makes the cache stale."""
    here = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for source in (here / "make_toy_models.py", *sorted((here / "toy").glob("*.py"))):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()


def cached_key(output: Path) -> dict[str, Any] | None:
    """The settings that `output` was made with, or None where there is none."""
    report = output / "toy.json"
    if not report.is_file():
        return None
    made = json.loads(report.read_text())
    return {field: made.get(field) for field in ("seed", "prompts", "script_sha256")}


def refuse_foreign(output: Path) -> None:
    """Raises SystemExit when replacing `output` would delete what this script did not write."""
    if not output.exists():
        return
    if not output.is_dir():
        raise SystemExit(f"--output {output} is a file; name a folder")
    ours = {"actor", "reward", "prompts.jsonl", "toy.json"}
    foreign = sorted({entry.name for entry in output.iterdir()} - ours)
    if foreign:
        raise SystemExit(
            f"--output {output} holds {foreign[0]}, which this script did not write; "
            f"name a new folder"
        )


def write_prompts(path: Path, count: int, seed: int) -> None:
    """`count` distinct questions as JSON lines; `topic` is there for a reward function."""
    drawn = random.Random(f"prompts/{seed}").sample(list(questions()), count)
    lines = []
    for number, question in enumerate(drawn):
        line: dict[str, Any] = {"prompt": render_prompt(question)}
        if number % CHAT_EVERY == CHAT_EVERY - 1:
            line = {"messages": [{"role": "user", "content": question}]}
        lines.append(json.dumps(line | {"topic": topic_of(question)}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
