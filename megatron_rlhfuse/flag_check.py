"""--rlhfuse-check: looks at a job's flags before it waits in a queue, and starts nothing."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from typing import NoReturn

from megatron_rlhfuse.last_words import PROGRAM, refuse

CHECK_FLAG = "--rlhfuse-check"


def ranks_to_check(argv: Sequence[str]) -> str | None:
    """Of --rlhfuse-check; makes this process look like rank 0 of such a job.

    Megatron reads the world from the environment while it parses.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(CHECK_FLAG)
    parser.error = refuse  # type: ignore[method-assign]
    given = parser.parse_known_args(argv)[0].rlhfuse_check
    if given is None:
        return None
    match = re.fullmatch(r"(?:([1-9]\d{0,5})x)?([1-9]\d{0,5})", given)
    if match is None:
        refuse(f"{CHECK_FLAG} {given}: want a number of ranks, or NODESxRANKS such as 2x8")
    nodes, ranks = int(match[1] or 1), int(match[2])
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(nodes * ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    return str(given)


def check_prompts(args: argparse.Namespace, ranks: str) -> NoReturn:
    """The rest of what can be checked without starting anything; ends the process."""
    from megatron_rlhfuse.assembly import load_prompts

    _, dataset = load_prompts(args)
    resumed = f"; goes on from {args.load}" if args.load else ""
    print(f"{PROGRAM}: fine for {ranks} rank(s): {len(dataset)} prompts{resumed}")
    raise SystemExit(0)
