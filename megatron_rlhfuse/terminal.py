"""What reaches the terminal, and what goes to a rank's log.

Megatron and its neighbours say about a thousand lines per run. On the terminal a user wants
progress and errors; everything else belongs to `RUN/logs/rank<r>.log`. Exceptions are printed by
Python itself and are never held back.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
from collections.abc import Iterator
from pathlib import Path

_held = logging.handlers.MemoryHandler(capacity=100_000, flushLevel=logging.CRITICAL + 1)
_log: Path | None = None


def hold_back() -> None:
    """Keeps log records and warnings in memory until the run's folder is known.

    Call before Megatron is imported: it warns while it is imported.
    """
    root = logging.getLogger()
    root.handlers = [_held]
    logging.captureWarnings(True)
    # torch prints with a handler of its own; a missing GPU is no news on a machine without one.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def log_to(path: Path) -> None:
    """Appends log records and warnings to `path` from now on, those held back first."""
    global _log
    path.parent.mkdir(parents=True, exist_ok=True)
    target = logging.FileHandler(path)
    target.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    _held.setTarget(target)
    _held.flush()
    logging.getLogger().handlers = [target]
    _log = path


@contextlib.contextmanager
def printing_to_log() -> Iterator[None]:
    """Sends what is printed while the block runs to the log given to `log_to`."""
    assert _log is not None, "log_to comes first"
    with open(_log, "a", buffering=1) as log, contextlib.redirect_stdout(log):
        yield
