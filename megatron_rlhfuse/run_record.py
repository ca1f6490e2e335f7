"""What a run leaves on disk and shows on the terminal; everything but the spans is rank 0's."""

from __future__ import annotations

import argparse
import json
import math
import statistics as st
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rlhfuse.dispatch.micro_batches import Figures
from megatron_rlhfuse.inference.scored import ScoredSample
from megatron_rlhfuse.observe import trace
from megatron_rlhfuse.observe.metrics import MetricsWriter, Value
from megatron_rlhfuse.observe.progress import Progress
from megatron_rlhfuse.rlhf.kl import kl_estimate
from megatron_rlhfuse.rlhf.statistics import explained_variance, policy_mismatch
from megatron_rlhfuse.rollout.controller import Decision
from megatron_rlhfuse.rollout_times import RolloutTimes, reduce_rollout
from megatron_rlhfuse.training.experience import Experience
from megatron_rlhfuse.training.fused_training import FusionTimes, reduce_times
from megatron_rlhfuse.training.ppo import Updates
from megatron_rlhfuse.training.trained_model import StepResult

FUSIONS = {
    (False, False): "none",
    (True, False): "inter",
    (False, True): "intra",
    (True, True): "both",
}
"""By: are generation and inference fused, is training."""


class RunRecord:
    """Metrics, trace and progress of a run in `--rlhfuse-run-dir`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._folder = Path(args.rlhfuse_run_dir)
        self._is_writer = args.rank == 0
        if not args.load:
            trace.discard(self._folder, args.rank, args.world_size)
        self.tracer = trace.Tracer(self._folder, args.rank, enabled=args.rlhfuse_trace)
        self.progress = Progress(args.train_iters, shown=False)
        self._writer: MetricsWriter | None = None
        self._values: dict[str, Value] = {}
        self._consumed = 0
        self._tokens = 0

    def open(self, resume_from: int) -> None:
        """Opens the files, once it is known which iteration the run starts from."""
        args = self._args
        self._consumed = resume_from * args.rollout_batch_size
        if not self._is_writer:
            return
        config = {key: value for key, value in vars(args).items() if _is_plain(value)}
        (self._folder / "args.json").write_text(json.dumps(config, indent=1, sort_keys=True))
        self._writer = MetricsWriter(
            self._folder,
            tensorboard=True,
            wandb_project=args.wandb_project or None,
            wandb_name=args.wandb_exp_name or None,
            config=config,
            resume_from=resume_from,
        )
        self.progress = Progress(args.train_iters, done=resume_from, shown=True)

    def describe(
        self,
        scored: Sequence[ScoredSample],
        experience: Experience,
        updates: Updates,
        kl_coefficient: float,
        optimizer_steps: int,
    ) -> None:
        """Takes down the iteration's samples and updates."""
        self._consumed += len(scored)
        self._tokens = sum(len(item.sample.response) for item in scored)
        self._values = {
            "fusion": FUSIONS[self._args.fuses_rollout, self._args.fuses_training],
            "consumed_samples": self._consumed,
            "optimizer_steps": optimizer_steps,
            "weight_version": min(item.sample.weight_version for item in scored),
            "kl_coefficient": kl_coefficient,
            **_sample_values(scored),
            **_experience_values(experience),
            "stopped_early": int(updates.stopped_early),
            **_policy_values(updates.actor),
            **_critic_values(updates.critic),
            **_dispatch_values(updates.dispatch),
        }

    def describe_fusion(self, times: FusionTimes | None) -> None:
        """Takes down how the iteration's fused steps went. COLLECTIVE."""
        self._values |= reduce_times(times)

    def describe_rollout(
        self, times: RolloutTimes, engine: Mapping[str, float], decision: Decision | None
    ) -> None:
        """Takes down generation and inference. COLLECTIVE.

        engine: what was observed of this rank's engine, zeros without; decision: on rank 0, where
            generation and inference are fused
        """
        self._values |= reduce_rollout(times, engine, decision)

    def write(self, iteration: int, seconds: Mapping[str, float], dropped: int) -> None:
        """Writes the iteration's line, and every rank its spans. COLLECTIVE."""
        self.tracer.flush()
        if self._writer is None:
            return
        whole = seconds["iteration"]
        tokens = self._tokens
        self._values |= {
            **{f"{stage}_s": value for stage, value in seconds.items()},
            "samples_per_s": self._args.rollout_batch_size / whole,
            "tokens_per_s": tokens / whole,
            "prompts_dropped": dropped,
        }
        self._writer.write(iteration, self._values)
        self.progress.update(iteration, self._values)

    def announce(self, start_iteration: int, prompts: int, dropped: int) -> None:
        """Says on the terminal what the run starts with."""
        if self._is_writer:
            left_out = f" ({dropped} too long and left out)" if dropped else ""
            resumed = f"; resumed after iteration {start_iteration}" if start_iteration else ""
            fusion = FUSIONS[self._args.fuses_rollout, self._args.fuses_training]
            print(
                f"{prompts} prompts{left_out}; fusion {fusion}; run folder {self._folder}{resumed}",
                flush=True,
            )
            if start_iteration >= self._args.train_iters:
                print(f"nothing to do: --train-iters is {self._args.train_iters}", flush=True)

    def finish(self, stopped_after: int | None, reason: str) -> None:
        """Merges the ranks' traces, and says where everything lies. All ranks have flushed.

        stopped_after: the last iteration, where the run ends before --train-iters, by `reason`.
        """
        if not self._is_writer:
            return
        self.progress.close()
        lines = []
        if stopped_after is not None:
            saved = "the checkpoint goes on from there" if self._args.save else "nothing is saved"
            lines.append(
                f"stopped by {reason} after iteration {stopped_after} of "
                f"{self._args.train_iters}: {saved}"
            )
        lines += [f"metrics      {self._folder / 'metrics.jsonl'}"]
        if self._args.rlhfuse_trace and trace.parts(self._folder):  # none without an iteration
            lines.append(f"trace        {trace.merge(self._folder)}")
        if self._args.save:
            lines.append(f"checkpoints  {self._args.save}")
        if self._args.save_hf and stopped_after is None:
            lines.append(f"models       {self._args.save_hf}")
        print("\n".join(lines), flush=True)

    def close(self) -> None:
        """Closes the files, also after an error."""
        self.tracer.flush()
        self.progress.close()
        if self._writer is not None:
            self._writer.close()


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, tuple))


def _sample_values(scored: Sequence[ScoredSample]) -> dict[str, Value]:
    lengths = sorted(len(item.sample.response) for item in scored)
    return {
        "response_length_mean": st.fmean(lengths),
        "response_length_median": st.median(lengths),
        "response_length_p99": lengths[math.ceil(0.99 * len(lengths)) - 1],
        "response_length_max": lengths[-1],
        "prompt_length_mean": st.fmean(len(item.sample.prompt) for item in scored),
        "stop_fraction": st.fmean(item.sample.stop_reason == "stop" for item in scored),
    }


def _experience_values(experience: Experience) -> dict[str, Value]:
    mask, tokens = experience.mask, experience.mask.sum()
    mismatch = policy_mismatch(experience.old_log_probs, experience.rollout_log_probs, mask)
    rewards = experience.rewards.sum(dim=1)
    advantages = experience.advantages[mask.bool()]
    values: dict[str, Value] = {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std(correction=0)),
        "score_mean": float(experience.scores.mean()),
        "advantages_mean": float(advantages.mean()),
        "advantages_std": float(advantages.std(correction=0)),
        "logprob_difference_mean": mismatch.mean_abs,
        "logprob_difference_max": mismatch.max_abs,
        "logprob_difference_kl": mismatch.kl,
    }
    if experience.reference_log_probs is not None:
        kl = kl_estimate("k1", experience.old_log_probs, experience.reference_log_probs, mask)
        values["kl"] = float(kl.sum() / tokens)
        values["kl_sequence"] = float(kl.sum(dim=1).mean())
    if experience.old_values is not None and experience.returns is not None:
        values["values_mean"] = float((experience.old_values * mask).sum() / tokens)
        values["returns_mean"] = float((experience.returns * mask).sum() / tokens)
        values["explained_variance"] = explained_variance(
            experience.old_values, experience.returns, mask
        )
    return values


def _policy_values(steps: Sequence[StepResult]) -> dict[str, Value]:
    if not steps:  # the critic's warm-up
        return {}
    names = {
        "policy_loss": "policy_loss",
        "entropy": "entropy",
        "clip_fraction": "clip_fraction",
        "approx_kl": "approx_kl",
        "ratio": "ratio_mean",
        "kl_loss": "kl_loss",
        "dual_clip_fraction": "dual_clip_fraction",
        "tis_weight": "tis_weight_mean",
        "tis_truncated_fraction": "tis_truncated_fraction",
    }
    return {
        "actor_grad_norm": st.fmean(step.grad_norm for step in steps),
        "actor_lr": steps[-1].learning_rate,
        **_means(steps, names),
    }


def _critic_values(steps: Sequence[StepResult]) -> dict[str, Value]:
    if not steps:
        return {}
    names = {"value_loss": "value_loss", "value_clip_fraction": "value_clip_fraction"}
    return {
        "critic_grad_norm": st.fmean(step.grad_norm for step in steps),
        "critic_lr": steps[-1].learning_rate,
        **_means(steps, names),
    }


def _dispatch_values(steps: Sequence[Figures]) -> dict[str, Value]:
    if not steps:
        return {}
    return {
        "padded_fraction": 1 - sum(s.tokens for s in steps) / sum(s.computed for s in steps),
        "replica_imbalance": st.fmean(step.imbalance for step in steps),
        "micro_batches": st.fmean(step.micro_batches for step in steps),
    }


def _means(steps: Sequence[StepResult], names: Mapping[str, str]) -> dict[str, Value]:
    """Mean over the optimizer steps of every metric that was reported, under its field name."""
    return {
        field: st.fmean(step.metrics[name] for step in steps)
        for name, field in names.items()
        if name in steps[0].metrics
    }
