"""The `rlhfuse` command: instant help, one line for bad input."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rlhfuse.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]


def test_help_lists_every_command_without_heavy_imports() -> None:
    script = """
import sys
from megatron_rlhfuse.cli import main
try:
    main(["--help"])
finally:
    print({"torch", "vllm", "megatron", "matplotlib", "numpy"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert all(command.help in done.stdout for command in COMMANDS.values())
    assert done.stdout.endswith("set()\n")


@pytest.mark.parametrize(
    ("argv", "culprit"),
    [
        ([], "COMMAND"),
        (["draw"], "'draw'"),
        (["--fast"], "COMMAND"),
        (["report"], "RUN"),
        (["report", "run", "--fast"], "--fast"),
        (["doctor", "run"], "run"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    argv: list[str], culprit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("rlhfuse")
    assert culprit in line


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: rlhfuse {name}" in capsys.readouterr().out
