"""Limits of a process that hands many memory files on."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource
from megatron_rlhfuse.rollout import lifetime
lifetime._OPEN_FILES = {most}
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
lifetime.allow_many_files()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "most", "allowed"),
    [(64, 500, 1000, 500), (500, 500, 1000, 500), (64, 500, 300, 300), (400, 500, 300, 400)],
)
def test_the_limit_of_open_files_is_lifted_as_far_as_it_may(
    soft: int, hard: int, most: int, allowed: int
) -> None:
    program = PROGRAM.format(soft=soft, hard=hard, most=most)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.split() == [str(allowed), str(hard)], run.stderr
