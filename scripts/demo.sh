#!/usr/bin/env bash
# PPO on the toy models, on two CPU cores: two ranks, pipeline parallelism 2, two vLLM engines.
# Run by `make demo`, which makes the environment and the toy models first.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${VENV:-.venv}/bin/python
toy=build/toy
run=${RUN_DIR:-runs/demo}
iterations=${ITERATIONS:-16}

# A demo starts afresh; the folder of an earlier run is all that it removes.
if [[ -f $run/args.json ]]; then
  rm -rf -- "$run"
elif [[ -n $(ls -A "$run" 2>/dev/null) ]]; then
  echo "demo.sh: $run exists and is not the folder of a run: choose another with RUN_DIR" >&2
  exit 2
fi

OMP_NUM_THREADS=1 "$python" -m torch.distributed.run --nproc-per-node 2 \
  --log-dir "$run/torchrun" pretrain_rlhf.py \
  --actor-model "$toy/actor" --reward-model "$toy/reward" --prompt-data "$toy/prompts.jsonl" \
  --tensor-model-parallel-size 1 --pipeline-model-parallel-size 2 \
  --rollout-instances 2 --rollout-max-prompt-tokens 64 --rollout-max-new-tokens 160 \
  --rollout-batch-size 64 --global-batch-size 32 --micro-batch-size 8 \
  --train-iters "$iterations" --ppo-epochs 2 --ppo-kl-coef 0.02 \
  --lr 3e-4 --min-lr 1e-4 --lr-decay-style linear --critic-lr 1e-3 \
  --save "$run/checkpoints" --save-interval 8 --save-hf "$run/models" \
  --rlhfuse-run-dir "$run"

"$python" -m megatron_rlhfuse report "$run"
