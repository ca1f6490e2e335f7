"""The generation stage: every generation instance's engine, driven by the rank that leads it.

Ranks are cut into as many equal blocks as there are instances; the first rank of a block leads
the instance. One instance makes all samples of a prompt, so that they share its cached prefix.

Fused with inference, an instance is released as soon as it has no samples any more, and the tail
of the samples migrates to few of them (controller, member, board). Not fused, all are released
together.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_rlhfuse import platform
from megatron_rlhfuse.data import Prompt
from megatron_rlhfuse.inference.queue import SampleQueue
from megatron_rlhfuse.migration.dispatch import dispatch_prompts
from megatron_rlhfuse.migration.lengths import LengthHistory
from megatron_rlhfuse.migration.meter import RateMeter
from megatron_rlhfuse.observe.trace import Tracer
from megatron_rlhfuse.rollout.controller import Decision, MigrationController, Rollout
from megatron_rlhfuse.rollout.engine import EngineError, GenerationEngine, WeightUpdate
from megatron_rlhfuse.rollout.from_flags import (
    engine_options,
    migration_options,
    sampling_options,
)
from megatron_rlhfuse.rollout.kv_relay import GlooRelay
from megatron_rlhfuse.rollout.lifetime import allow_many_files
from megatron_rlhfuse.rollout.member import Member
from megatron_rlhfuse.rollout.nixl_relay import NixlRelay
from megatron_rlhfuse.rollout.prompt_rounds import PromptBatch
from megatron_rlhfuse.rollout.samples import GenerationRequest, Sample
from megatron_rlhfuse.rollout.tail_cut import TailCut

# How long a leader listens to its engine before it looks at signals again.
_POLL_S = 0.5

# And before it looks at the board: a few decode steps.
_MEMBER_POLL_S = 0.05

# How long NIXL may read a file of keys and values, before tokens are computed again instead.
_KV_READ_LIMIT_S = 30.0


class GenerationStage:
    """This rank's part of generation: an engine on a leader, nothing on other ranks."""

    def __init__(self, args: argparse.Namespace, tracer: Tracer) -> None:
        block = args.world_size // args.rollout_instances
        self._args = args
        self._instance = args.rank // block
        nodes = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
        self._nodes = tuple(str(i * block // nodes) for i in range(args.rollout_instances))
        self._block = block
        self._relay: GlooRelay | None = None
        self._controller: MigrationController | None = None
        self._member: Member | None = None
        self._instances = args.rollout_instances
        self._seed = args.seed
        self._tracer = tracer
        self._engine: GenerationEngine | None = None
        self._restarts_seen = self._recomputed_seen = self._discarded = 0
        self._watched = False
        if args.rank % block == 0:
            self._engine = GenerationEngine(
                self._instance, engine_options(args, self._instance), sampling_options(args)
            )

    def start(self) -> None:
        """Starts the engine without waiting: it loads while the models are built."""
        if self._engine is not None:
            self._engine.start()

    def make_room(self) -> None:
        """Lets an engine that shares its GPU with training finish its start, and sleep.

        vLLM measures the free memory while it starts: nothing may be allocated beside it then.
        On a machine without GPUs engines go on loading while the models are built.
        """
        if self._engine is not None and self._engine.options.enable_sleep:
            self._engine.wait_until_ready()
            self._engine.sleep()

    def wait_until_ready(self) -> None:
        """Waits for this rank's engine. Raises EngineError naming it and its log.

        COLLECTIVE over all ranks.
        """
        if self._engine is not None:
            self._engine.wait_until_ready()
        if not self._args.fuses_rollout:
            return
        if len(set(self._nodes)) > 1:
            limit = timedelta(seconds=self._args.rlhfuse_stage_timeout)
            group = dist.new_group(backend="gloo", timeout=limit)
            if self._engine is not None:
                self._relay = self._make_relay(group)
        if self._args.rank == 0:
            assert self._engine is not None
            self._controller = MigrationController(
                migration_options(self._args),
                self._args.rlhfuse_migration_threshold is None,
                RateMeter(self._engine.built.kv_bytes_per_token),
                LengthHistory(self._args.rollout_max_new_tokens),
            )

    def _make_relay(self, group: dist.ProcessGroup) -> GlooRelay:
        allow_many_files()  # one for every file that comes
        if self._args.rlhfuse_migration_relay == "nixl":
            return NixlRelay(group, self._block, _KV_READ_LIMIT_S)
        return GlooRelay(group, self._block)

    def generate(
        self, queue: SampleQueue, iteration: int, batch: PromptBatch, expected: Sequence[float]
    ) -> None:
        """Makes this instance's samples of the iteration and offers each as it finishes.

        Returns once the engine has no samples any more: its own and, fused, migrated ones.
        `expected`: tokens of the responses to each prompt of the batch, all together.
        """
        if self._engine is None:
            return
        self._discarded = 0
        # With prompts left out there is no tail that could migrate.
        migrates = self._args.fuses_rollout and not batch.leaves_out
        if self._controller is not None:
            self._watch(queue, iteration, batch if migrates else None)
        prompts = dispatch_prompts(expected, self._instances, self._args.rollout_dispatch)
        mine = prompts[self._instance]
        if batch.leaves_out and self._args.rollout_dispatch == "longest-first":
            mine.reverse()  # the longest are what is left out: they must not take a place first
        requests = [
            GenerationRequest(each, batch[each].token_ids, batch.seed(self._seed, each))
            for position in mine
            for each in batch.samples(position)
        ]
        if migrates:
            self._generate_and_migrate(queue, iteration, requests)
        elif batch.leaves_out:
            self._generate_shortest(queue, iteration, batch, requests)
        else:
            self._engine.submit(requests)
            while self._engine.unfinished:
                self._offer(queue, iteration, self._engine.poll(_POLL_S))
        queue.close(iteration)

    def _generate_shortest(
        self,
        queue: SampleQueue,
        iteration: int,
        batch: PromptBatch,
        requests: Sequence[GenerationRequest],
    ) -> None:
        assert self._engine is not None
        self._engine.submit(requests)
        cut = TailCut(self._engine, queue, iteration, batch)
        while self._engine.unfinished:
            self._offer(queue, iteration, cut.finished(self._engine.poll(_MEMBER_POLL_S)))
            cut.step()
        self._discarded = cut.discarded_tokens

    def _generate_and_migrate(
        self, queue: SampleQueue, iteration: int, requests: Sequence[GenerationRequest]
    ) -> None:
        assert self._engine is not None
        board = queue.board(iteration)
        # Before the engine has anything to do: it reads off what the engine did until now.
        member = self._member = Member(self._engine, board, self._nodes, self._relay, self._tracer)
        self._engine.submit(requests)
        waiting_since = time.monotonic()
        while True:
            self._offer(queue, iteration, self._engine.poll(_MEMBER_POLL_S))
            member.step()
            if member.leave():
                return
            if self._engine.unfinished:
                waiting_since = time.monotonic()
            elif time.monotonic() - waiting_since > self._args.rlhfuse_stage_timeout:
                raise EngineError(
                    f"generation instance {self._instance}: samples were to come from another "
                    f"instance, and have not within {self._args.rlhfuse_stage_timeout:.0f} s"
                )
            else:
                time.sleep(_MEMBER_POLL_S / 10)  # something is on its way here

    def _offer(self, queue: SampleQueue, iteration: int, samples: Iterable[Sample]) -> None:
        for sample in samples:
            queue.push_finished(iteration, sample)
            self._trace(sample)

    def release(self, queue: SampleQueue, iteration: int, ranks: Sequence[int]) -> None:
        """After `sleep`, fused: gives this rank's block free, and waits until `ranks` are free."""
        if self._engine is not None:
            queue.board(iteration).release(self._instance)
        for instance in sorted({rank // self._block for rank in ranks}):
            queue.wait_released(iteration, instance)

    def _watch(self, queue: SampleQueue, iteration: int, batch: PromptBatch | None) -> None:
        """Of an iteration without migration (None) only removes what the last one has left."""
        assert self._controller is not None
        if iteration > 1:
            queue.board(iteration - 1).delete(self._instances)
        self._watched = batch is not None
        if batch is not None:
            self._controller.start(
                self.rollout(batch), queue.board(iteration), lambda: queue.counts(iteration)
            )

    def rollout(self, prompts: Sequence[Prompt]) -> Rollout:
        """What is known of a rollout beforehand; on ranks that lead an instance."""
        assert self._engine is not None
        args = self._args
        return Rollout(
            instances=self._instances,
            samples=len(prompts),
            samples_per_prompt=self._args.rollout_samples_per_prompt,
            prompt_tokens=sum(len(prompt.token_ids) for prompt in prompts) / len(prompts),
            max_num_seqs=args.rollout_max_num_seqs,
            kv_capacity=self._engine.built.kv_tokens,
        )

    def finish(self, lengths: Sequence[int], scored: int, scoring_s: float) -> Decision | None:
        """After the iteration's samples are scored: what the controller decided, on rank 0.

        lengths: of all responses; scored, scoring_s: by this rank's inference instance
        """
        if self._engine is not None and self._args.fuses_rollout:
            self._engine.forget_exports()  # all samples are finished: nobody reads them any more
        if self._relay is not None:
            self._relay.forget()
        if self._controller is None:
            return None
        self._controller.meter.inference(scored, scoring_s)
        if self._member is not None:
            counts = self._member.counts
            self._controller.meter.transfer(counts.kv_bytes, counts.extract_s, same_node=True)
        # Lengths without the longest would mislead the next choice of a threshold.
        return self._controller.finish(lengths) if self._watched else None

    def update_weights(
        self, stream: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> WeightUpdate | None:
        """Gives the engine new weights; every rank must consume the collective stream."""
        if self._engine is None:
            for _ in stream:
                pass
            return None
        return self._engine.update_weights(stream, version)

    def sleep(self) -> None:
        """Gives the engine's memory back to training, where it can."""
        if self._engine is None:
            return
        if self._engine.options.enable_sleep:
            self._engine.sleep()
        elif self._args.fuses_rollout:
            self._engine.free_cache()

    def wake(self) -> None:
        """Takes that memory again, before new weights arrive."""
        platform.release_memory()
        if self._engine is not None:
            self._engine.wake()

    def observe(self) -> dict[str, float]:
        """`peak_bytes` of this rank's engine, and since the last call its `restarts`, the samples
        `migrated` away, their `kv_bytes` and `extract_s`, the `recomputed` tokens, and those
        `discarded` with prompts that were left out."""
        names = ("peak_bytes", "restarts", "migrated", "kv_bytes", "extract_s", "recomputed")
        seen = dict.fromkeys((*names, "discarded"), 0.0)
        if self._engine is None:
            return seen
        seen["peak_bytes"] = platform.peak_resident_bytes(self._engine.pid)
        seen["restarts"] = self._engine.restarts - self._restarts_seen
        seen["recomputed"] = self._engine.recomputed_tokens - self._recomputed_seen
        self._restarts_seen = self._engine.restarts
        self._recomputed_seen = self._engine.recomputed_tokens
        seen["discarded"], self._discarded = self._discarded, 0
        if self._member is not None:
            counts, self._member = self._member.counts, None
            seen["migrated"], seen["kv_bytes"] = counts.given, counts.kv_bytes
            seen["extract_s"] = counts.extract_s
        return seen

    def close(self) -> None:
        """Ends the engine; leaves no process."""
        if self._controller is not None:
            self._controller.stop()
        if self._engine is not None:
            self._engine.close()

    def _trace(self, sample: Sample) -> None:
        self._tracer.add(
            f"sample {sample.sample_id}",
            sample.started,
            sample.finished,
            track=f"engine {self._instance} samples",
            category="sample",
            tokens=len(sample.response),
            stop_reason=sample.stop_reason,
        )
