"""How a job ends that cannot go on: one line on standard error, and an exit status."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

PROGRAM = "pretrain_rlhf.py"

REFUSED_FILE = "refused.txt"


def refuse(message: str, run: Path | None = None) -> NoReturn:
    """Ends the process with status 2; one line, from one rank of each node.

    A folder or file may be missing on one node alone. run: the run folder, to leave the message
    there, too: torchrun hides the status from a script that must not start such a job again.
    """
    if is_spokesman():
        complain(message)
    if run is not None and os.environ.get("RANK") == "0":
        (run / REFUSED_FILE).write_text(message + "\n", encoding="utf-8")
    raise SystemExit(2)


def is_spokesman() -> bool:
    """Whether this rank speaks for its node."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def complain(message: str) -> None:
    """Says what is wrong, in one line."""
    line = " ".join(message.split())
    print(f"{PROGRAM}: error: {line}", file=sys.stderr, flush=True)
