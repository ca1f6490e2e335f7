"""Generation and inference with real engines, two ways by turns: how much faster, as predicted?

    python benchmarks/rollout.py [--compare fusion|dispatch|rebalance|extra-prompts] [--fusion none]
                                 [--pace S] [--repeats N] [--instances N] [--samples N] [--tokens N]
                                 [--threshold auto|F] [--transfer auto|kv|tokens] [--model toy|50m]
                                 [--max-num-seqs N] [--extra F]
    python benchmarks/rollout.py --transfer-costs

Two ranks (--instances), each with a vLLM engine and an inference instance. Rollouts of the same
prompts with the same seeds are made both ways, by turns; times are medians. With --pace a step of
an engine takes at least so long, as on a GPU that decodes few sequences as fast as one; without it
engines and inference compete for the cores, which two GPUs' memory-bound decoding does not.

What is compared:
  fusion         one stage after the other, and both at once with the tail migrated
  dispatch       prompts round-robin; longest first, by the lengths of earlier turns (the toy
                 model's say nothing about its next) and, foreseen, by those that came out: it
                 matters where samples wait for a place (--max-num-seqs)
  rebalance      one migration, and as many as pay: with two instances there is only one
  extra-prompts  every prompt trained at once, and the longest put off (--extra of the batch)

Progress goes to standard error. The last line of standard output is JSON. Of `fusion`: serial_s,
fused_s, speedup; predicted_serial_s, predicted_fused_s, predicted_speedup, which the simulation
makes of the rates measured before and the lengths that came out; migrated (samples per rollout),
recomputed_tokens_per_sample, mismatched_tokens (between the two ways), threshold, paced. The others
name their two sides, and give a speedup too.

--transfer-costs migrates samples of a 50M-parameter model at contexts of 100, 400 and 1600 tokens,
with keys and values and with tokens only: seconds that the source is held up, and seconds until
the destination has made the next token of all of them, per sample.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORKERS = Path(__file__).with_name("rollout_workers.py")
TOY = ROOT / "build" / "toy"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--transfer-costs", action="store_true", help="of migrating a sample; some three minutes"
    )
    parser.add_argument(
        "--compare",
        choices=["fusion", "dispatch", "rebalance", "extra-prompts"],
        default="fusion",
        help="the two ways",
    )
    parser.add_argument("--pace", type=float, default=0.02, help="seconds of a step, at least")
    parser.add_argument("--repeats", type=int, default=5, help="rollouts each way")
    parser.add_argument("--instances", type=int, default=2, help="ranks, each with an engine")
    parser.add_argument("--samples", type=int, default=64, help="of a rollout")
    parser.add_argument("--threshold", default="auto", help="--rlhfuse-migration-threshold")
    parser.add_argument("--transfer", default="auto", help="--rlhfuse-migration-transfer")
    parser.add_argument("--model", choices=["toy", "50m"], default="toy")
    parser.add_argument(
        "--fusion",
        choices=["none", "inter"],
        default="inter",
        help="of both sides, where it is not what is compared",
    )
    parser.add_argument("--max-num-seqs", type=int, default=256, help="--rollout-max-num-seqs")
    parser.add_argument("--extra", type=float, default=0.25, help="--rollout-extra-prompts")
    parser.add_argument("--tokens", type=int, default=160, help="longest response")
    options = parser.parse_args()
    if options.repeats < 1 or options.samples < 2 or options.samples % 2:
        parser.error("--repeats must be at least 1, --samples even and at least 2")
    if options.compare in ("fusion", "rebalance") and options.fusion == "none":
        parser.error(f"--compare {options.compare} wants --fusion inter")
    if not (TOY / "actor").is_dir():
        parser.error(f"no toy models in {TOY}; run `make toy`")
    with tempfile.TemporaryDirectory(prefix="rollout-") as scratch:
        folder = Path(scratch)
        if options.model == "50m" or options.transfer_costs:
            from rollout_models import make_random_model

            make_random_model(folder / "50m", TOY / "actor")
        if options.transfer_costs:
            from rollout_transfers import transfer_costs

            result = transfer_costs(folder)
        else:
            run = subprocess.run(
                _command(options, folder),
                cwd=ROOT,
                env={"OMP_NUM_THREADS": "1", **os.environ},
                stdout=sys.stderr,
            )
            if run.returncode:
                return run.returncode
            result = json.loads((folder / "result.json").read_text())
            result |= {"compare": options.compare, "fusion": options.fusion}
            result |= {"paced": options.pace > 0, "pace_s": options.pace, "model": options.model}
    print(json.dumps(result))
    return 0


def _command(options: argparse.Namespace, folder: Path) -> list[str]:
    model = TOY / "actor" if options.model == "toy" else folder / "50m"
    flags: dict[str, Any] = {
        "actor-model": model,
        "prompt-data": TOY / "prompts.jsonl",
        "rollout-instances": options.instances,
        # One replica on all ranks: training is not what is measured, and any batch fits it.
        "pipeline-model-parallel-size": options.instances,
        "rollout-max-prompt-tokens": 64,
        "rollout-max-new-tokens": options.tokens,
        "rollout-batch-size": options.samples,
        "rollout-pace": options.pace,
        "global-batch-size": options.samples,
        "micro-batch-size": 2,
        "train-iters": options.repeats,
        "lr": 1e-5,
        "rlhfuse-fusion": options.fusion,
        "rollout-max-num-seqs": options.max_num_seqs,
        "rollout-extra-prompts": options.extra if options.compare == "extra-prompts" else 0,
        "rlhfuse-migration-threshold": options.threshold,
        "rlhfuse-migration-transfer": options.transfer,
        "rlhfuse-run-dir": folder / "run",
    }
    if options.model == "toy":
        flags["reward-model"] = TOY / "reward"
    else:
        flags["reward-function"] = "rollout_models:no_reward"  # beside the workers' script
        flags["critic-model"] = model
    pairs = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(options.instances),
    ]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    # Random weights never stop by themselves: one token in thirty ends a response.
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    stops = ["--rollout-stop-token-ids", *map(str, range(0, vocabulary, 30))]
    return [
        *torchrun,
        *rendezvous,
        str(WORKERS),
        str(folder / "result.json"),
        options.compare,
        *pairs,
        *(stops if options.model != "toy" else []),
    ]


if __name__ == "__main__":
    sys.exit(main())
