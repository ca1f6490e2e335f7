"""The `rlhfuse` command.

A subcommand is a line in COMMANDS and a module with `add_arguments(parser)` and
`run(args, refuse) -> exit status`; the first line of the module's docstring describes it. Only
the module of the subcommand asked for gets imported, so `rlhfuse --help` is instant. Bad input
goes to `refuse(message)`: one line on stderr, exit status 2, never a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from megatron_rlhfuse.schedule.errors import escape

Refuse = Callable[[str], NoReturn]


class Command(NamedTuple):
    """A subcommand: the module that holds it, and what it does."""

    module: str
    help: str


COMMANDS = {
    "plan": Command("megatron_rlhfuse.schedule.plan_command", "plan a fused pipeline schedule"),
    "simulate": Command(
        "megatron_rlhfuse.schedule.simulate_command",
        "predict the training stage of a cluster, fused and not",
    ),
    "report": Command("megatron_rlhfuse.observe.report", "draw a run into one HTML page and PNGs"),
    "doctor": Command("megatron_rlhfuse.doctor", "check the machine and try every installed part"),
    "patch": Command(
        "megatron_rlhfuse.patch_command", "prepare a Megatron-LM tree of one's own for fusion"
    ),
}


def positive_seconds(text: str) -> float:
    """The type of a flag that takes a time."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"want a number of seconds above 0, got {text[:40]}")
    return value


def whole_number(lowest: int, highest: int = 10**18 - 1) -> Callable[[str], int]:
    """The type of a flag that takes a whole number."""
    span = f"from {lowest}" + (f" to {highest}" if highest < 10**18 - 1 else "")

    def parse(text: str) -> int:
        digits = text.isdecimal() and text.isascii() and len(text) <= 18
        if not digits or not lowest <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"want a whole number {span}, got {text[:40]}")
        return int(text)

    return parse


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse prints the usage first."""
        self.refuse(f"{message} (see {self.prog} --help)")

    def refuse(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {escape(message)}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit status; `argv` is sys.argv[1:] by default."""
    width = max(map(len, COMMANDS))
    parser = _Parser(
        prog="rlhfuse",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="rlhfuse COMMAND ...",
        description="commands:\n"
        + "\n".join(f"  {name:{width}}  {command.help}" for name, command in COMMANDS.items()),
        epilog="rlhfuse COMMAND --help tells more about one of them.",
    )
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=argparse.SUPPRESS)
    rest = parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    rest.required = False  # else argparse names it in its message where COMMAND is missing
    chosen = parser.parse_args(argv)

    try:
        module = importlib.import_module(COMMANDS[chosen.command].module)
    except ImportError as error:
        if "_planner" not in str(error):
            raise
        parser.refuse(
            f"the compiled schedule search does not load ({error}); scripts/install.sh builds it"
        )
    description = (module.__doc__ or "").partition("\n")[0]
    command_parser = _Parser(prog=f"rlhfuse {chosen.command}", description=description)
    module.add_arguments(command_parser)
    args = command_parser.parse_args(chosen.rest)
    try:
        status = module.run(args, command_parser.refuse)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
