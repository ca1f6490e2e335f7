"""Times whole PPO iterations on the toy models: two ranks, PP 2, two vLLM engines.

    python benchmarks/iteration.py [--iterations N] [--warmup N] [--fusion none] [--run-dir DIR]

Progress goes to standard error. The last line of standard output is JSON with medians over the
iterations after the warm-up, and `peak_rss_mb`, the peak resident memory of the largest process:
generation_s, inference_s, training_s, iteration_s, samples_per_s, tokens_per_s, peak_rss_mb.
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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--iterations", type=int, default=8, help="iterations to measure")
    parser.add_argument("--warmup", type=int, default=1, help="iterations to run before those")
    parser.add_argument("--fusion", choices=["none"], default="none", help="--rlhfuse-fusion")
    parser.add_argument("--toy", type=Path, default=ROOT / "build" / "toy", help="toy models")
    parser.add_argument("--run-dir", type=Path, help="keep the run's folder here")
    options = parser.parse_args()
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
    for name in MEDIANS:
        result[name] = round(statistics.median(record[name] for record in measured), 4)
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
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    pairs = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [*torchrun, "pretrain_rlhf.py", *pairs]


if __name__ == "__main__":
    sys.exit(main())
