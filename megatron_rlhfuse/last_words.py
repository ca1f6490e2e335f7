"""How a job ends that cannot go on: one line on standard error, and an exit status."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

PROGRAM = "pretrain_rlhf.py"


def refuse(message: str) -> NoReturn:
    """Ends the process with status 2; one line, from one rank of each node.

    A folder or file may be missing on one node alone.
    """
    if is_spokesman():
        complain(message)
    raise SystemExit(2)


def is_spokesman() -> bool:
    """Whether this rank speaks for its node."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def complain(message: str) -> None:
    """Says what is wrong, in one line."""
    line = " ".join(message.split())
    print(f"{PROGRAM}: error: {line}", file=sys.stderr, flush=True)
