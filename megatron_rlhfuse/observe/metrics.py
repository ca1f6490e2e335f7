"""The numbers of every iteration: `metrics.jsonl`, mirrored to TensorBoard and W&B when asked.

Invariants of `metrics.jsonl`:
- one line of strict JSON per iteration, iterations increasing, each exactly once, also after a
  resume: lines of iterations that the resumed run will do again move to `metrics.replaced.jsonl`;
- every field is declared in METRICS;
- null is a number that was computed and is not finite; what was not measured is left out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from megatron_rlhfuse.observe import jsonl

FILE_NAME = "metrics.jsonl"
REPLACED_FILE_NAME = "metrics.replaced.jsonl"


class Metric(NamedTuple):
    """One declared field; `group` is its heading in TensorBoard, W&B and the documentation."""

    group: str
    unit: str
    description: str


METRICS: dict[str, Metric] = {
    "iteration": Metric("run", "", "number of the PPO iteration, from 1"),
    "time": Metric("run", "s", "time of writing, seconds since 1970"),
    "fusion": Metric("run", "", "fusion mode of the iteration"),
    "consumed_samples": Metric("run", "samples", "prompts consumed since the run began"),
    "weight_version": Metric("run", "", "version of the actor weights the samples were made with"),
    "engine_restarts": Metric("run", "", "generation engines started again in this iteration"),
    "prompts_dropped": Metric("run", "prompts", "too long prompts dropped since the run began"),
    "peak_rss_mb": Metric("run", "MB", "peak resident memory of the largest process"),
    "reward_mean": Metric("reward", "", "mean over samples of the reward that PPO maximises"),
    "reward_std": Metric("reward", "", "its standard deviation over samples"),
    "score_mean": Metric("reward", "", "mean score of reward model or function, before any KL"),
    "kl": Metric("reward", "nats/token", "KL of policy to reference, mean over response tokens"),
    "kl_sequence": Metric("reward", "nats", "KL of policy to reference, summed over a response"),
    "kl_coefficient": Metric("reward", "", "weight of the KL in reward or loss"),
    "policy_loss": Metric("policy", "", "clipped policy loss"),
    "entropy": Metric("policy", "nats/token", "entropy of the policy, mean over response tokens"),
    "clip_fraction": Metric("policy", "", "share of tokens whose probability ratio was clipped"),
    "dual_clip_fraction": Metric("policy", "", "share of tokens bounded by the dual clip"),
    "kl_loss": Metric("policy", "nats/token", "KL term of the loss, before its coefficient"),
    "stopped_early": Metric("policy", "", "1 where --ppo-early-stop-kl ended the actor's updates"),
    "approx_kl": Metric("policy", "nats/token", "KL of the updated policy to the sampling policy"),
    "ratio_mean": Metric("policy", "", "mean probability ratio of updated to sampling policy"),
    "advantages_mean": Metric("policy", "", "mean advantage over response tokens"),
    "advantages_std": Metric("policy", "", "standard deviation of the advantage over tokens"),
    "value_loss": Metric("value", "", "clipped value loss"),
    "value_clip_fraction": Metric("value", "", "share of tokens whose value was clipped"),
    "values_mean": Metric("value", "", "mean value over response tokens"),
    "returns_mean": Metric("value", "", "mean return over response tokens"),
    "explained_variance": Metric("value", "", "1 - Var(return - value) / Var(return)"),
    "response_length_mean": Metric("length", "tokens", "mean response length"),
    "response_length_median": Metric("length", "tokens", "median response length"),
    "response_length_p99": Metric("length", "tokens", "99th percentile of the response length"),
    "response_length_max": Metric("length", "tokens", "longest response"),
    "prompt_length_mean": Metric("length", "tokens", "mean prompt length"),
    "stop_fraction": Metric("length", "", "share of responses that ended by themselves"),
    "generation_s": Metric("time", "s", "generation stage"),
    "inference_s": Metric("time", "s", "inference stage: reference, critic and reward scoring"),
    "training_s": Metric("time", "s", "training stage: actor and critic"),
    "weight_sync_s": Metric("time", "s", "sending the actor's weights to the engines"),
    "checkpoint_s": Metric("time", "s", "saving checkpoints"),
    "iteration_s": Metric("time", "s", "the whole iteration"),
    "rollout_s": Metric("rollout", "s", "generation and inference together"),
    "rollout_idle_s": Metric(
        "rollout", "s", "of that, a rank neither generating nor scoring; mean over ranks"
    ),
    "inference_start_s": Metric("rollout", "s", "first sample scored, after generation's start"),
    "deferred_prompts": Metric(
        "rollout", "prompts", "left out for being the longest; trained later, together"
    ),
    "discarded_tokens": Metric(
        "rollout", "tokens", "at least so many generated for prompts that were left out"
    ),
    "migration_threshold": Metric(
        "rollout", "", "share of the batch from which on the tail may migrate"
    ),
    "migrated_samples": Metric("rollout", "samples", "samples that went to another engine"),
    "migration_start_s": Metric(
        "rollout", "s", "when the first migration was decided, after generation's start"
    ),
    "migration_s": Metric("rollout", "s", "engines' time for giving samples away, summed"),
    "migrated_kv_mb": Metric("rollout", "MB", "keys and values that migrated"),
    "recomputed_tokens": Metric(
        "rollout", "tokens", "computed again for migrated samples; with keys and values one each"
    ),
    "predicted_rollout_s": Metric("rollout", "s", "rollout_s as simulated beforehand"),
    "predicted_serial_rollout_s": Metric("rollout", "s", "the same without fusion"),
    "padded_fraction": Metric(
        "dispatch", "", "share of the tokens that training computes which is padding"
    ),
    "replica_imbalance": Metric(
        "dispatch", "", "the dearest data-parallel replica of a step over the mean one"
    ),
    "micro_batches": Metric(
        "dispatch", "", "micro-batches of a replica in a step, mean over steps of both models"
    ),
    "fusion_plan": Metric(
        "fusion", "", "where the fused steps' plan came from: 1f1b, greedy, search, cache, file"
    ),
    "fused_steps": Metric("fusion", "steps", "steps in which actor and critic trained at once"),
    "makespan_s": Metric("fusion", "s", "measured makespan of a fused step, mean"),
    "planned_makespan_s": Metric("fusion", "s", "makespan of its plan, from measured stage times"),
    "makespan_over_planned": Metric("fusion", "", "measured over planned makespan"),
    "bubble_fraction": Metric("fusion", "", "share of a fused step in which ranks stand idle"),
    "samples_per_s": Metric("time", "samples/s", "samples per second of the whole iteration"),
    "tokens_per_s": Metric("time", "tokens/s", "response tokens per second of the whole iteration"),
    "logprob_difference_mean": Metric(
        "mismatch", "nats", "mean |rollout - training log-probability| of response tokens"
    ),
    "logprob_difference_max": Metric("mismatch", "nats", "largest such difference"),
    "tis_truncated_fraction": Metric(
        "mismatch", "", "share of tokens whose importance weight was truncated"
    ),
    "logprob_difference_kl": Metric(
        "mismatch", "nats/token", "KL of rollout to training policy (k3 estimate)"
    ),
    "tis_weight_mean": Metric("mismatch", "", "mean truncated importance weight"),
    "actor_grad_norm": Metric("optimizer", "", "gradient norm of the actor before clipping"),
    "critic_grad_norm": Metric("optimizer", "", "gradient norm of the critic before clipping"),
    "actor_lr": Metric("optimizer", "", "learning rate of the actor"),
    "critic_lr": Metric("optimizer", "", "learning rate of the critic"),
    "optimizer_steps": Metric("optimizer", "steps", "actor steps taken since the run began"),
}

TEXT = frozenset({"fusion", "fusion_plan"})
"""The fields that hold words; all others hold numbers."""

STAGE_SECONDS = {
    "generation_s": "generation",
    "inference_s": "inference",
    "training_s": "training",
    "weight_sync_s": "weight sync",
    "checkpoint_s": "checkpoint",
}
"""The fields whose sum is (almost) `iteration_s`, in the order of the iteration, with labels."""

Value = float | int | str | None


class MetricsWriter:
    """Writes one record per iteration; belongs to one process of the run (rank 0).

    directory: folder of the run, made if missing; TensorBoard's files go to its `tensorboard/`.
    tensorboard: mirror every number under the tag `group/name`.
    wandb_project: W&B project to mirror to, None for none; wandb_name, config: of the W&B run.
    resume_from: the last iteration that the loaded checkpoint holds, 0 for a fresh run.
    """

    def __init__(
        self,
        directory: Path | str,
        tensorboard: bool = False,
        wandb_project: str | None = None,
        wandb_name: str | None = None,
        config: Mapping[str, Any] | None = None,
        resume_from: int = 0,
    ) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # The mirrors first: a missing package must not leave a truncated file behind.
        self._tensorboard = _open_tensorboard(directory, resume_from) if tensorboard else None
        self._wandb = (
            _open_wandb(directory, wandb_project, wandb_name, config or {})
            if wandb_project
            else None
        )
        self._path = directory / FILE_NAME
        self._last_iteration = _keep_until(self._path, resume_from)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, iteration: int, values: Mapping[str, Value]) -> None:
        """Appends the record of `iteration`; NaN and infinity become null, None is left out.

        Raises ValueError for an undeclared field or an iteration not after the last one.
        """
        undeclared = sorted(set(values) - set(METRICS))
        if undeclared:
            raise ValueError(f"metrics not declared in observe/metrics.py METRICS: {undeclared}")
        if iteration <= self._last_iteration:
            raise ValueError(
                f"{self._path}: iteration {iteration} after iteration {self._last_iteration}"
            )
        measured = {name: value for name, value in values.items() if value is not None}
        self._file.write(jsonl.encode({"iteration": iteration, "time": time.time(), **measured}))
        self._file.flush()
        self._last_iteration = iteration
        numbers = {
            f"{METRICS[name].group}/{name}": value
            for name, value in measured.items()
            if not isinstance(value, str)
        }
        if self._tensorboard is not None:
            for tag, value in numbers.items():
                self._tensorboard.add_scalar(tag, value, iteration)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log({"iteration": iteration, **numbers})

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, without a last line torn by a kill.

    Raises ValueError naming file and line for a bad record.
    """
    records = jsonl.read(Path(path))
    for number, record in enumerate(records, start=1):
        if not isinstance(record.get("iteration"), int):
            raise ValueError(f"{path}:{number}: field 'iteration' must be an integer")
        for name, value in record.items():
            is_number = value is None or isinstance(value, int | float)
            if name in METRICS and name not in TEXT and not is_number:
                raise ValueError(f"{path}:{number}: field {name!r} must be a number, not {value!r}")
    return records


def _keep_until(path: Path, iteration: int) -> int:
    """Leaves in `path` the records up to `iteration`; returns the last iteration left, or 0."""
    if not path.exists():
        return 0
    jsonl.repair(path)
    records = read_metrics(path)
    kept = [record for record in records if record["iteration"] <= iteration]
    replaced = [record for record in records if record["iteration"] > iteration]
    if replaced:
        # Kept aside, because a fresh run started in the folder of an old one is a likely slip.
        with path.with_name(REPLACED_FILE_NAME).open("a", encoding="utf-8") as file:
            file.writelines(jsonl.encode(record) for record in replaced)
        jsonl.write_atomically(path, "".join(jsonl.encode(record) for record in kept))
    return kept[-1]["iteration"] if kept else 0


def _open_tensorboard(directory: Path, resume_from: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            f"every run writes TensorBoard files, and TensorBoard cannot be imported ({error}): "
            "`pip install tensorboard`"
        ) from error
    # purge_step hides what an earlier run wrote after the checkpoint that this one resumes from.
    return SummaryWriter(str(directory / "tensorboard"), purge_step=resume_from + 1)


def _open_wandb(directory: Path, project: str, name: str | None, config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError(
            f"--wandb-project {project} needs the package wandb, which cannot be imported "
            f"({error}): `pip install wandb`, or leave --wandb-project out"
        ) from error
    # W&B's own step counter cannot go back, so a resumed run is a further W&B run in one group;
    # drawn over `iteration`, the two fit together.
    run = wandb.init(project=project, name=name, group=name, dir=str(directory), config=config)
    run.define_metric("iteration")
    run.define_metric("*", step_metric="iteration")
    return run
