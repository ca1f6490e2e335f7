"""Writes docs/flags.md: every flag that this project adds to Megatron's, from the parser itself.

    python scripts/make_flag_reference.py [--check]

With --check writes nothing and exits with status 1 where the file is out of date.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

TARGET = Path(__file__).resolve().parent.parent / "docs" / "flags.md"
HEADER = """# Flags of pretrain_rlhf.py

Made by `python scripts/make_flag_reference.py`.

`--train-iters` counts PPO iterations, `--global-batch-size`
is the PPO mini-batch (one optimizer step), and learning-rate flags count PPO iterations. The
architecture of each model comes from its folder.

Megatron's flags for parallelism, precision, recomputation, optimizer, learning rate, DDP,
checkpoints and W&B work as they do in Megatron-LM. Those that would do harm or be ignored are
refused with a message (`megatron_rlhfuse/unsupported_flags.py` lists them); Megatron's own logging
and evaluation flags (`--log-*`, `--eval-*`) have no effect.
"""


def reference() -> str:
    """The page: one table per flag group."""
    from megatron_rlhfuse.arguments import add_rlhfuse_arguments

    parser = argparse.ArgumentParser()
    own = len(parser._action_groups)
    add_rlhfuse_arguments(parser)
    parts = [HEADER]
    for group in parser._action_groups[own:]:
        parts.append(f"\n## {group.title}\n\n{_sentence(group.description or '')}\n")
        parts.append("\n| flag | default | meaning |\n| --- | --- | --- |\n")
        for action in group._group_actions:
            flag = f"`{' / '.join(action.option_strings)}`"
            if action.choices:
                flag += " " + ", ".join(f"`{choice}`" for choice in action.choices)
            default = "" if action.default in (None, []) else f"`{action.default}`"
            parts.append(f"| {flag} | {default} | {(action.help or '').replace('%%', '%')} |\n")
    return "".join(parts)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    page = reference()
    if not parser.parse_args().check:
        TARGET.write_text(page)
        return 0
    if TARGET.read_text() != page:
        print(f"{TARGET} is out of date: run python scripts/make_flag_reference.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
