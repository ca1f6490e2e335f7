"""Checks the versions and the machine of this installation, and tries each engine once.

Exit status 0 if all that a run needs is here and works, 1 if something must change. The lines are
explained in docs/doctor.md.

check.py          one line of the report
installation.py   versions, compiled parts, plugin: from metadata, without importing packages
machine.py        GPUs, NCCL, memory, shared memory, network: what is judged is passed in
environment.py    variables and limits that jobs inherit
torch_facts.py    what torch says of the machine, asked in a process of its own
child.py          a program with a time-out, of which nothing stays behind
self_tests.py     which self-tests there are; how their outcome becomes a line
trials/           their programs
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

from megatron_rlhfuse.cli import Refuse
from megatron_rlhfuse.doctor import environment, installation, machine, self_tests, torch_facts
from megatron_rlhfuse.doctor.check import Check


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `rlhfuse doctor`."""
    parser.add_argument(
        "--no-self-test",
        dest="self_test",
        action="store_false",
        help="only look at versions and machine: seconds instead of a minute",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object instead of lines",
    )


def run(args: argparse.Namespace, refuse: Refuse) -> int:
    """Prints every check; returns 1 if one is bad."""
    checks = inspect()
    names = [test.subject for test in self_tests.ALL] if args.self_test else []
    width = max(map(len, [*(check.subject for check in checks), *names]))

    def say(check: Check) -> None:
        if not args.json:
            print(check.to_line(width), flush=True)

    for check in checks:
        say(check)
    if args.self_test:
        checks += _self_test(say)
    bad = [check.subject for check in checks if check.verdict == "BAD"]
    if args.json:
        report = {"ok": not bad, "checks": [check.to_json() for check in checks]}
        print(json.dumps(report, indent=2))
    else:
        print(f"To put right: {', '.join(bad)}" if bad else "All that a run needs is here.")
    return 1 if bad else 0


def inspect() -> list[Check]:
    """Looks at versions and machine; starts one process, which asks torch."""
    facts, fault = torch_facts.ask()
    gpus = facts.gpus if facts is not None else ()
    return [
        *installation.checks(gpus),
        *machine.checks(facts, fault),
        *environment.checks(len(gpus)),
    ]


def _self_test(say: Callable[[Check], None]) -> list[Check]:
    done = []
    with self_tests.ending_on_sigterm():
        for test in self_tests.ALL:
            done.append(self_tests.check(test))
            say(done[-1])
    return done
