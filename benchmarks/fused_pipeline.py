"""Runs fused plans for real: do they take the time and the memory that was planned?

    python benchmarks/fused_pipeline.py --emulate [--instance 0..11] [--unit-ms U]
                                        [--message-kib N] [--search-seconds S]
    python benchmarks/fused_pipeline.py --real [--ranks 2] [--micro-batches M] [--length L]
                                        [--layers N]
    python benchmarks/fused_pipeline.py --overhead [--ranks 4] [--message-kib N]
                                        all: [--repeats R]

--emulate   a published instance; its stages sleep for as long as they are planned to compute, and
            hold as much memory. Processes, transfers and the executor are real; sleeping ranks do
            not compete for cores. The plan is searched for with the time of a transfer, measured
            on these ranks.
--real      two GPT models in opposite directions, which measure, plan and train by themselves.
--overhead  the 1F1B of a model that computes nothing, by the executor and by Megatron's own loop.
            The others measure this too, on their ranks.

Progress goes to standard error. The last line of standard output is JSON. Times are medians over
the repeats, in which fused and serial runs alternate:
  planned_s, measured_s, measured_over_planned: the fused step, of all ranks;
  planned_serial_1f1b_s, serial_1f1b_s: Megatron's own schedule, one model after the other;
  planned_speedup, speedup, speedup_over_planned: of fused over serial;
  measured_spread_s, serial_spread_s: shortest and longest run;
  peak_activation_error: largest relative error of a rank's peak of activation memory;
  executor_us_per_subtask, megatron_us_per_subtask: a rank's time for a forward or a backward that
  computes nothing, its transfers included; ..._cpu_us_...: all its threads, without waiting;
  --real only: planned_under_load_s, planned_speedup_under_load: the same plan with the times that
  its subtasks took in the measured runs.
A step ends with its last forward or backward (--emulate), or when the call returns (the others).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_rlhfuse.rollout.lifetime import die_with_parent
from megatron_rlhfuse.schedule.baselines import one_f_one_b
from megatron_rlhfuse.schedule.evaluate import evaluate
from megatron_rlhfuse.schedule.plan import Plan, make_plan, plan_to_json
from megatron_rlhfuse.schedule.problem import Model, Problem, load_problem

ROOT = Path(__file__).resolve().parent.parent
WORKERS = Path(__file__).with_name("fused_workers.py")

MODES = ("emulate", "real", "overhead")

OVERHEAD_MICRO_BATCHES = 32

OVERHEAD_REPEATS = 8


def main() -> int:
    options = _parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the ranks first
    with tempfile.TemporaryDirectory(prefix="fused-") as name:
        folder = Path(name)
        calls: dict[str, dict[str, Any]] = {}
        if options.mode == "emulate":
            calls["emulate"] = {
                "problem_file": str(_problem_file(options.instance)),
                "plan_file": str(folder / "plan.json"),
                "unit_s": options.unit_ms / 1e3,
                "message_kib": options.message_kib,
                "search_seconds": options.search_seconds,
                "repeats": options.repeats,
            }
        elif options.mode == "real":
            calls["real"] = {
                "folder": name,
                "micro_batches": options.micro_batches,
                "length": options.length,
                "layers": options.layers,
                "repeats": options.repeats,
            }
        calls["overhead"] = {
            "plan_file": _write(_overhead_plan(options.ranks), folder / "overhead.json"),
            "message_kib": options.message_kib,
            "repeats": options.repeats if options.mode == "overhead" else OVERHEAD_REPEATS,
        }
        found = _run_ranks(options.ranks, calls, folder)
    result: dict[str, Any] = {
        "mode": options.mode,
        "ranks": options.ranks,
        "repeats": options.repeats,
    }
    if options.mode == "emulate":
        result |= {"instance": options.instance, "unit_ms": options.unit_ms}
    if options.mode != "overhead":
        result |= _against_plan(found[options.mode])
    print(json.dumps(result | _overhead(found["overhead"], options.ranks)), flush=True)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    modes = parser.add_mutually_exclusive_group(required=True)
    for mode in MODES:
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode)
    parser.add_argument("--ranks", type=int, help="processes (default: the instance's, 2 or 4)")
    parser.add_argument(
        "--repeats", type=int, default=8, help="runs to measure, each way (default: 8)"
    )
    parser.add_argument("--message-kib", type=int, default=64, help="of a hop (default: 64)")
    emulate = parser.add_argument_group("--emulate")
    emulate.add_argument("--instance", type=int, default=1, help="0 to 11 (default: 1)")
    emulate.add_argument("--unit-ms", type=float, default=8.0, help="a unit of time (default: 8)")
    emulate.add_argument(
        "--search-seconds", type=float, default=5.0, help="for the plan (default: 5)"
    )
    real = parser.add_argument_group("--real")
    real.add_argument("--micro-batches", type=int, default=4, help="of each model (default: 4)")
    real.add_argument("--length", type=int, default=128, help="of a sequence (default: 128)")
    real.add_argument("--layers", type=int, default=4, help="of each model (default: 4)")
    options = parser.parse_args()
    for name in ("repeats", "message_kib", "unit_ms", "search_seconds", "micro_batches", "length"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name.replace('_', '-')}: want a number above 0")
    if not _problem_file(options.instance).exists():
        parser.error("--instance: want a number from 0 to 11")
    ranks = {"emulate": _problem(options).devices, "real": 2, "overhead": 4}[options.mode]
    if options.ranks is None:
        options.ranks = ranks
    if options.mode == "emulate" and options.ranks != ranks:
        parser.error(f"--ranks: instance {options.instance} is for {ranks}")
    if options.ranks < 2:
        parser.error("--ranks: want at least 2, for a pipeline")
    if options.layers % options.ranks and options.mode == "real":
        parser.error(f"--layers: want a multiple of {options.ranks}, the ranks")
    return options


def _problem_file(instance: int) -> Path:
    return ROOT / "examples" / "problems" / f"published-{instance:02d}.json"


def _problem(options: argparse.Namespace) -> Problem:
    return load_problem(_problem_file(options.instance))


def _overhead_plan(ranks: int) -> Plan:
    """Plain 1F1B of one model."""
    ones = (1.0,) * ranks
    model = Model("tiny", OVERHEAD_MICRO_BATCHES, ones, ones, ones, (tuple(range(ranks)),))
    problem = Problem(ranks, (model,))
    timeline = evaluate(problem, one_f_one_b(problem))
    return make_plan(timeline, greedy=timeline.makespan, seconds=0.0)


def _write(plan: Plan, path: Path) -> str:
    path.write_text(json.dumps(plan_to_json(plan)))
    return str(path)


def _run_ranks(ranks: int, calls: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What the functions of fused_workers.py return on rank 0."""
    (folder / "calls.json").write_text(json.dumps(calls))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    # Port 0: the launcher itself listens on a free port, so no other job can take it.
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    command += ["--local-addr", "127.0.0.1", str(WORKERS), str(folder)]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command,
        stdout=sys.stderr,
        env={"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **os.environ, "PYTHONPATH": paths},
        preexec_fn=die_with_parent,
    )
    try:
        if status := process.wait():
            sys.exit(f"the ranks failed with exit status {status}: see above")
    finally:
        _end(process)
    return json.loads((folder / "results.json").read_text())


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends torchrun, which ends its ranks; they die with it if it cannot."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    process.kill()
    process.wait()


def _against_plan(found: dict[str, Any]) -> dict[str, Any]:
    measured, serial = (statistics.median(found[way]) for way in ("fused", "serial"))
    planned, planned_serial = found["planned"], found["planned_serial"]
    result = {
        "planned_s": planned,
        "measured_s": measured,
        "measured_over_planned": measured / planned,
        "planned_serial_1f1b_s": planned_serial,
        "serial_1f1b_s": serial,
        "planned_speedup": planned_serial / planned,
        "speedup": serial / measured,
        "speedup_over_planned": serial / measured * planned / planned_serial,
        "peak_activation_error": found["peak_error"],
    }
    if "transfer_ms" in found:
        result["transfer_ms"] = found["transfer_ms"]
    if "source" in found:
        loaded = found["planned_under_load"]
        result["source"] = found["source"]
        result["planned_under_load_s"] = loaded
        result["planned_speedup_under_load"] = found["planned_serial_under_load"] / loaded
    return {
        **{name: _rounded(value) for name, value in result.items()},
        "measured_spread_s": _spread(found["fused"]),
        "serial_spread_s": _spread(found["serial"]),
    }


def _overhead(found: dict[str, Any], ranks: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in ("executor", "megatron"):
        walls, cpus = zip(*found[name], strict=True)
        micros = 1e6 / found["subtasks"]
        result[f"{name}_us_per_subtask"] = round(statistics.median(walls) * micros, 1)
        result[f"{name}_cpu_us_per_subtask"] = round(statistics.median(cpus) * micros / ranks, 1)
        result[f"{name}_us_spread"] = [round(s * micros, 1) for s in (min(walls), max(walls))]
    return result


def _spread(times: Sequence[float]) -> list[float]:
    return [round(min(times), 5), round(max(times), 5)]


def _rounded(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
