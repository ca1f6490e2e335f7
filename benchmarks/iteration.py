"""Times whole PPO iterations on the toy models: two ranks, PP 2, two vLLM engines.

    python benchmarks/iteration.py [--iterations N] [--warmup N] [--fusion none|inter|intra|both]
                                   [--run-dir DIR]

Progress goes to standard error. The last line of standard output is JSON with medians over the
iterations after the warm-up, and `peak_rss_mb`, the peak resident memory of the largest process:
generation_s, inference_s, training_s, weight_sync_s, iteration_s, samples_per_s, tokens_per_s,
peak_rss_mb. With fusion, which is planned anew in every run, also fusion_plan of the last
iteration, and medians of makespan_s, planned_makespan_s, makespan_over_planned, bubble_fraction.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEDIANS = (
    "generation_s",
    "inference_s",
    "training_s",
    "weight_sync_s",
    "iteration_s",
    "samples_per_s",
    "tokens_per_s",
)
FUSION_MEDIANS = (
    "makespan_s",
    "planned_makespan_s",
    "makespan_over_planned",
    "bubble_fraction",
)
# Four fused steps measure the stages, two in an iteration; then a second of search.
FUSION_WARMUP = 4
PLAN_SECONDS = 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=8, help="iterations to measure")
    parser.add_argument(
        "--warmup",
        type=int,
        help=f"iterations to run before those (default: 1; with fusion {FUSION_WARMUP}, in which "
        "it finds its plan)",
    )
    parser.add_argument(
        "--fusion",
        choices=["none", "inter", "intra", "both"],
        default="none",
        help="--rlhfuse-fusion",
    )
    parser.add_argument("--toy", type=Path, default=ROOT / "build" / "toy", help="toy models")
    parser.add_argument("--run-dir", type=Path, help="keep the run's folder here")
    options = parser.parse_args()
    fused = options.fusion in ("intra", "both")
    if options.warmup is None:
        options.warmup = FUSION_WARMUP if fused else 1
    if options.iterations < 1 or options.warmup < 0:
        parser.error("--iterations must be at least 1 and --warmup at least 0")
    if not (options.toy / "actor").is_dir():
        parser.error(f"--toy {options.toy}: no toy models there; run `make toy`")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.run_dir or Path(scratch)
        run = subprocess.run(
            _command(options, folder.resolve()),
            cwd=ROOT,
            env={"OMP_NUM_THREADS": "1", **os.environ},
            stdout=sys.stderr,
        )
        if run.returncode:
            return run.returncode
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    measured = [json.loads(line) for line in lines][options.warmup :]
    result: dict[str, object] = {"fusion": options.fusion, "iterations": len(measured)}
    if fused:
        result["fusion_plan"] = measured[-1]["fusion_plan"]
    for name in (*MEDIANS, *(FUSION_MEDIANS if fused else ())):
        # Before the stages are measured there is no planned makespan.
        values = [record[name] for record in measured if name in record]
        result[name] = round(statistics.median(values), 4) if values else None
    result["peak_rss_mb"] = round(max(record["peak_rss_mb"] for record in measured), 1)
    print(json.dumps(result))
    return 0


def _command(options: argparse.Namespace, run_folder: Path) -> list[str]:
    flags = {
        "actor-model": options.toy / "actor",
        "reward-model": options.toy / "reward",
        "prompt-data": options.toy / "prompts.jsonl",
        "pipeline-model-parallel-size": 2,
        "rollout-instances": 2,
        "rollout-max-prompt-tokens": 64,
        "rollout-max-new-tokens": 160,
        "rollout-batch-size": 64,
        "global-batch-size": 32,
        "micro-batch-size": 4,
        "train-iters": options.warmup + options.iterations,
        "lr": 1e-5,  # small: the length of responses should not drift while it is timed
        "rlhfuse-fusion": options.fusion,
        "rlhfuse-run-dir": run_folder,
    }
    if options.fusion in ("intra", "both"):
        flags |= {"rlhfuse-plan-cache": "none", "rlhfuse-plan-seconds": PLAN_SECONDS}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    pairs = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [*torchrun, "pretrain_rlhf.py", *pairs]


if __name__ == "__main__":
    sys.exit(main())
