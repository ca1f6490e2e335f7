"""Runs one trial: `python -m megatron_rlhfuse.doctor.trials NAME FOLDER PARENT_PID`.

Writes FOLDER/result.json: what was found, or the last line of what went wrong.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import traceback
from pathlib import Path

from megatron_rlhfuse.doctor.check import last_line
from megatron_rlhfuse.doctor.child import RESULT
from megatron_rlhfuse.rollout.lifetime import die_with_parent


def main() -> None:
    name, folder, parent = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    die_with_parent(parent)
    # A part that crashes leaves a line in the report, and no core file in the user's folder.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    found, error = None, ""
    try:
        found = importlib.import_module(f"megatron_rlhfuse.doctor.trials.{name}").run(folder)
    except Exception as fault:
        traceback.print_exc()
        error = last_line(str(fault)) or type(fault).__name__
        if not isinstance(fault, AssertionError | RuntimeError):
            error = f"{type(fault).__name__}: {error}"
    (folder / RESULT).write_text(json.dumps({"found": found, "error": error}))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # taking the modules of torch and Megatron apart would cost seconds
