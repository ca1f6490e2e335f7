"""Plans found before, on disk: a job that is started again plans nothing.

A plan is kept under a hash of all that its search depended on but the measured times: layouts,
micro-batches, models, machine. A plan that is out of date still trains the same weights; the
metrics then show that it is not kept to.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rlhfuse.schedule.errors import ScheduleError
from megatron_rlhfuse.schedule.plan import Plan, load_plan, plan_to_json

VERSION = 1


def default_folder() -> Path:
    """Where plans are kept if nobody says otherwise: the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "megatron_rlhfuse" / "plans"


class PlanCache:
    """A folder of plans, a file each. Faults of the disk cost time, never a run."""

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder)

    def path(self, key: Mapping[str, Any]) -> Path:
        """The file of a problem; `key` is anything that JSON holds."""
        text = json.dumps({"version": VERSION, **key}, sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def load(self, key: Mapping[str, Any]) -> Plan | None:
        """The plan of a problem; None if there is none, or none that can be used."""
        try:
            return load_plan(self.path(key))
        except (OSError, ScheduleError):
            return None

    def store(self, key: Mapping[str, Any], plan: Plan) -> None:
        """Keeps a plan. Does nothing where the folder cannot be written."""
        path = self.path(key)
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            part.write_text(json.dumps(plan_to_json(plan)))
            part.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
