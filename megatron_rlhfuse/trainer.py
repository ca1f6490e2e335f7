"""One PPO iteration on this rank: generate, infer, train, publish the weights, record.

`pretrain_rlhf.py` reads as the algorithm; this file is what each of its steps does.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from megatron_rlhfuse import last_words, platform
from megatron_rlhfuse.assembly import (
    Inference,
    build_trained_models,
    connect_queue,
    load_prompts,
    start_megatron,
)
from megatron_rlhfuse.data import PromptSampler
from megatron_rlhfuse.inference.scored import ScoredSample
from megatron_rlhfuse.migration.prompt_lengths import PromptLengths
from megatron_rlhfuse.models.save import save_hf
from megatron_rlhfuse.pipeline.broadcast import broadcast_messages
from megatron_rlhfuse.rlhf.kl import make_kl_controller
from megatron_rlhfuse.rollout.controller import Decision
from megatron_rlhfuse.rollout.prompt_rounds import PromptBatch, PromptRounds, extra_prompts
from megatron_rlhfuse.rollout.stage import GenerationStage
from megatron_rlhfuse.rollout_times import RolloutTimes
from megatron_rlhfuse.run_record import RunRecord
from megatron_rlhfuse.stop_request import StopRequest
from megatron_rlhfuse.training.checkpoint import agree_on_load, load_checkpoint, save_checkpoint
from megatron_rlhfuse.training.checkpoint_folder import CheckpointError, remove_partial
from megatron_rlhfuse.training.experience import Experience, build_experience
from megatron_rlhfuse.training.fused_training import FusedTraining
from megatron_rlhfuse.training.ppo import PPO, advantage_options

# For rank 0 to remove what a save has left that failed, before other ranks end.
_TIDYING_S = 60.0


class Trainer:
    """A whole job on one rank. Use as a context manager: leaving it ends the engine."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.run = RunRecord(args)
        self.tracer = self.run.tracer
        self.stop = StopRequest(args)
        self.generation = GenerationStage(args, self.tracer)
        self._seconds: dict[str, float] = {}
        self._rollout = RolloutTimes()
        self._decision: Decision | None = None

    def __enter__(self) -> Trainer:
        try:
            self._set_up()
        except BaseException:
            self.generation.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.generation.close()
        if self.fused is not None:
            self.fused.close()
        if kind is None:
            self._finish()
        self.run.close()

    def _set_up(self) -> None:
        args = self.args
        self.stop.clear()
        platform.set_up_rank(args.local_rank)
        self.generation.start()  # engines take longest: they load while the models are built
        self._load_prompts()
        self.generation.make_room()
        start_megatron()
        dist.barrier()
        self.queue = connect_queue(args)
        self.models = build_trained_models(args)
        self.inference = Inference(args, self.models, self.tokenizer, self.tracer)
        self.fused = (
            FusedTraining.build(args, self.models, self.tracer) if args.fuses_training else None
        )
        self.ppo = PPO(args, self.models, self.tracer, self.fused)
        self.kl_controller = make_kl_controller(
            "adaptive" if args.ppo_kl_target else "fixed",
            args.ppo_kl_coef,
            target=args.ppo_kl_target,
            horizon=args.ppo_kl_horizon,
        )
        self.start_iteration = 0
        agree_on_load(args)
        if args.load:
            self._resume()
        self.run.open(self.start_iteration)
        self.generation.wait_until_ready()
        self.generation.wake()
        self._send_weights()
        self.run.announce(self.start_iteration, len(self.dataset), self.dataset.dropped)

    def _load_prompts(self) -> None:
        args = self.args
        self.tokenizer, self.dataset = load_prompts(args)
        trained = args.rollout_batch_size // args.rollout_samples_per_prompt
        extra = extra_prompts(trained, args.rollout_extra_prompts)
        self.sampler = PromptSampler(len(self.dataset), trained + extra, args.seed)
        self.rounds = PromptRounds(
            self.dataset, self.sampler, args.rollout_samples_per_prompt, trained
        )
        self.lengths = PromptLengths()
        self._heeds_lengths = args.rollout_dispatch == "longest-first"

    def iterations(self) -> Iterator[int]:
        """Numbers of the iterations to run, from 1; after a resume the first one not yet done.

        Ends early once all ranks have agreed to stop.
        """
        for iteration in range(self.start_iteration + 1, self.args.train_iters + 1):
            self._seconds = {}
            self._started = time.perf_counter()
            with self.tracer.span(f"iteration {iteration}", "iteration", iteration=iteration):
                yield iteration
            if self.stop.after is not None:
                return

    def next_prompts(self, iteration: int) -> PromptBatch:
        """The prompt of every sample of the iteration, by sample id; the same on every rank."""
        return self.rounds.next_batch(iteration)

    def generate(self, iteration: int, prompts: PromptBatch) -> None:
        """Every engine makes its samples.

        All ranks go on together once all samples are finished; fused with inference, each goes on
        as soon as its engine has no samples any more, its own or migrated ones.
        """
        self._rollout = RolloutTimes()
        expected = [
            self.lengths.expected(drawn.prompt.index) * prompts.copies for drawn in prompts.drawn
        ]
        with self._stage("generation", together=not self.args.fuses_rollout):
            self.generation.generate(self.queue, iteration, prompts, expected)
            self._rollout.released = time.time()
            if not self.args.fuses_rollout:
                with self.tracer.span("wait for other engines", "wait"):
                    self.queue.wait_finished(iteration)
            self.generation.sleep()

    def infer(self, iteration: int, prompts: PromptBatch) -> list[ScoredSample]:
        """Inference instances score all samples; returns those to train by sample id, on every
        rank."""
        with self._stage("inference"):
            if self.args.fuses_rollout:
                self.generation.release(self.queue, iteration, self.inference.instance.ranks)
            scoring = self.inference.instance.score_all(self.queue, iteration, prompts)
            if self.args.fuses_rollout:
                with self.tracer.span("wait for other ranks", "wait"):
                    self.queue.wait_scored(iteration)
            collected = self.queue.collect(iteration) if dist.get_rank() == 0 else None
            scored = [ScoredSample.from_bytes(m) for m in broadcast_messages(collected, 0)]
        self._rollout.finish(scoring, self.queue.generation_end(iteration))
        self._seconds |= self._rollout.stages
        lengths = {item.sample.sample_id: len(item.sample.response) for item in scored}
        self._decision = self.generation.finish(
            list(lengths.values()), scoring.samples, scoring.seconds
        )
        kept = self.rounds.settle(prompts, lengths)
        # Which of the others were answered whole depends on time.
        self.lengths.add((prompts[each].index, lengths[each]) for each in kept)
        if self.args.rollout_extra_prompts:
            self._rollout.settle(len(prompts.drawn) - prompts.trained, lengths, kept)
        scored = [item for item in scored if item.sample.sample_id in kept]
        return sorted(scored, key=lambda item: item.sample.sample_id)

    def train(self, iteration: int, scored: Sequence[ScoredSample]) -> None:
        """PPO's epochs over the rollout batch: the actor's and the critic's optimizer steps."""
        with self._stage("training"):
            coefficient = self.kl_controller.value
            experience = build_experience(scored, advantage_options(self.args), coefficient)
            updates = self.ppo.update(iteration, experience, coefficient)
            self.run.describe(scored, experience, updates, coefficient, self.ppo.optimizer_steps)
            if self.fused is not None:
                self.run.describe_fusion(self.fused.take_times())
                if dist.get_rank() == 0:
                    self.fused.write_plan(Path(self.args.rlhfuse_run_dir) / "plan.json")
            self._adapt_kl(experience)

    def publish_weights(self, iteration: int) -> None:
        """Gives the trained weights to engines and inference instances; saves when due."""
        with self._stage("weight_sync"):
            self.generation.wake()
            self._send_weights(version=iteration)
        args = self.args
        is_last = self.stop.agree(iteration)
        due = args.save_interval and iteration % args.save_interval == 0
        if args.save and (due or is_last):
            with self._stage("checkpoint"):
                self._save(iteration)

    def record(self, iteration: int) -> None:
        """Writes the iteration's line of metrics and the trace."""
        self._seconds["iteration"] = time.perf_counter() - self._started
        self.run.describe_rollout(self._rollout, self.generation.observe(), self._decision)
        self.run.write(iteration, self._seconds, self.dataset.dropped)

    def _stage(self, name: str, together: bool = True) -> _Stage:
        self.run.progress.stage(name)
        return _Stage(self, name, together)

    def _send_weights(self, version: int | None = None) -> None:
        """COLLECTIVE. The version of weights is the iteration that trained them."""
        self.generation.update_weights(
            self.models.actor.hf_weights(), self.start_iteration if version is None else version
        )
        self.inference.refresh()

    def _adapt_kl(self, experience: Experience) -> None:
        if experience.reference_log_probs is None:
            return
        difference = (experience.old_log_probs - experience.reference_log_probs) * experience.mask
        per_sequence = float(difference.sum(dim=1).mean())
        self.kl_controller.update(per_sequence, len(experience.scores))

    def _progress(self, iteration: int) -> dict[str, object]:
        return {
            "iteration": iteration,
            "data": self.sampler.state_dict(),
            "rounds": self.rounds.state_dict(),
            **({"lengths": self.lengths.state_dict()} if self._heeds_lengths else {}),
            "prompts": self.dataset.digest,
            "kl": self.kl_controller.state_dict(),
            "optimizer_steps": self.ppo.optimizer_steps,
        }

    def _save(self, iteration: int) -> None:
        try:
            progress = self._progress(iteration)
            save_checkpoint(self.args, iteration, self.models.by_name(), progress)
        except CheckpointError as fault:
            if fault.is_own or last_words.is_spokesman():
                last_words.complain(str(fault))
            if dist.get_rank() == 0:
                remove_partial(Path(self.args.save), iteration)
            else:  # torchrun ends all ranks as soon as one has ended
                time.sleep(_TIDYING_S)
            raise SystemExit(1) from fault

    def _resume(self) -> None:
        try:
            progress = load_checkpoint(self.args, self.models.by_name())
            if progress["prompts"] != self.dataset.digest:
                raise CheckpointError(
                    f"--load {self.args.load} was made with other prompts than --prompt-data "
                    "gives now: resume with the same files and --rollout-max-prompt-tokens"
                )
            self.sampler.load_state_dict(progress["data"])
            self.rounds.load_state_dict(progress.get("rounds", {}))
            if self._heeds_lengths and "lengths" in progress:
                self.lengths.load_state_dict(progress["lengths"])
            self.kl_controller.load_state_dict(progress["kl"])
        except (CheckpointError, ValueError) as fault:
            last_words.refuse(str(fault), Path(self.args.rlhfuse_run_dir))
        self.start_iteration = int(progress["iteration"])
        self.ppo.optimizer_steps = int(progress["optimizer_steps"])

    def _finish(self) -> None:
        args = self.args
        if args.save_hf and self.stop.after is None:
            for name, model in self.models.by_name().items():
                source = args.actor_model if name == "actor" else args.critic_model
                save_hf(
                    Path(args.save_hf) / name,
                    source,
                    model.hf_weights(),
                    write=dist.get_rank() == 0,
                )
        self.tracer.flush()
        dist.barrier()  # rank 0 merges what all have flushed
        self.run.finish(self.stop.after, self.stop.reason)
        self.stop.settle()
        dist.destroy_process_group()


class _Stage:
    """Times a stage between barriers, so that its seconds are the slowest rank's.

    Without a barrier at its end (`together` False) they are this rank's.
    """

    def __init__(self, trainer: Trainer, name: str, together: bool) -> None:
        self._trainer, self._name, self._together = trainer, name, together

    def __enter__(self) -> None:
        self._start = time.perf_counter()
        self._span = self._trainer.tracer.span(self._name, self._name)
        self._span.__enter__()

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None and self._together:
            with self._trainer.tracer.span("wait for other ranks", "wait"):
                platform.synchronize()
                dist.barrier()
        self._span.__exit__(*exception)  # type: ignore[arg-type]
        self._trainer._seconds[self._name] = time.perf_counter() - self._start
