"""The engine process's main loop: the parent's commands between the engine's steps.

Invariants:
- weights come from the trainer only; no request is taken before the first update;
- weights change, and the engine sleeps, only while no sample is unfinished: a sample is made by
  one version of the weights;
- finished samples go out as soon as the step that finished them ends;
- a sample that is extracted leaves with everything that its next token depends on, as of one
  moment between two steps.
"""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_rlhfuse.rollout.kv_connector import (
    KVTransfer,
    OpenFiles,
    cache_size,
    free_cache,
)
from megatron_rlhfuse.rollout.messages import (
    Abort,
    Asleep,
    BucketLoaded,
    Configure,
    Extract,
    Extracted,
    Finished,
    Forget,
    FreeCache,
    Progress,
    Ready,
    Request,
    Resumed,
    Sleep,
    Stop,
    Submit,
    UpdateWeights,
    WeightsLoaded,
)
from megatron_rlhfuse.rollout.resumption import generator_states, resume_in_scheduler
from megatron_rlhfuse.rollout.samples import GenerationRequest, PartialSample, Sample
from megatron_rlhfuse.rollout.vllm_engine import build_engine, sampling_params

PROGRESS_INTERVAL_S = 0.25
"""Four observations a second: a migration decision needs no more, and they cost nothing."""


class Outbox(Protocol):
    """Where messages to the parent go; putting one never blocks."""

    @property
    def empty(self) -> bool: ...

    def put(self, message: object) -> None: ...


class EngineLoop:
    """One vLLM engine and the requests it holds."""

    def __init__(self, configure: Configure, inbox: queue.SimpleQueue[Any], outbox: Outbox) -> None:
        self._instance = configure.instance
        self._sampling = configure.sampling
        self._inbox = inbox
        self._outbox = outbox
        self._weight_version: int | None = None
        self._asleep = False
        self._requests: dict[int, _Held] = {}  # by ticket
        self._tickets: dict[str, int] = {}  # by the request id that the scheduler uses
        self._finished_tokens = 0
        self._steps = 0
        self._prefill_tokens, self._prefill_seconds = 0, 0.0
        self._window = _Window()
        self._pace_s = configure.options.pace_s
        self._engine = build_engine(configure.options)
        self._transfer = KVTransfer(self._engine) if configure.options.migrates else None
        resume_in_scheduler(self._core)

    def run(self) -> None:
        """Serves until told to stop."""
        from megatron_rlhfuse.rollout.weight_transfer import weight_names

        cache = self._core.vllm_config.cache_config
        tokens = cache.num_gpu_blocks * cache.block_size
        cache_bytes = sum(self._engine.collective_rpc(cache_size))
        names = tuple(self._engine.apply_model(weight_names)[0])
        self._outbox.put(Ready(names, tokens, cache_bytes / tokens))
        while self._obey():
            self._step()

    def close(self) -> None:
        """Ends the workers and frees what they share."""
        self._engine.engine_core.shutdown()

    @property
    def lost_a_worker(self) -> bool:
        """Whether a worker process of a tensor-parallel engine has died."""
        workers = getattr(self._engine.model_executor, "workers", ())
        return any(not worker.proc.is_alive() for worker in workers)

    def _obey(self) -> bool:
        """Carries out the commands that are there, waiting for one where nothing else is to do.

        Returns:
            False once told to stop.
        """
        while True:
            try:
                command = self._inbox.get(block=not self._requests)
            except queue.Empty:
                return True
            match command:
                case Submit():
                    self._submit(command)
                case Abort():
                    self._abort(command)
                case Extract():
                    self._extract(command)
                case Forget():
                    self._forget_exports()
                case FreeCache():
                    self._free_cache()
                case UpdateWeights():
                    self._update_weights(command)
                case Sleep():
                    self._sleep()
                case Stop():
                    return False
                case _:
                    raise TypeError(f"unknown command {command!r}")

    def _submit(self, command: Submit) -> None:
        if self._weight_version is None or self._asleep:
            raise RuntimeError("requests came before weights")
        for ticket, request in command.requests:
            held = self._hold(request)
            request_id = self._engine.add_request(
                str(ticket),
                {"prompt_token_ids": list(held.request.prompt)},
                sampling_params(self._sampling, held.request.seed, held.before, held.kv_files),
            )
            self._tickets[request_id] = ticket
            self._requests[ticket] = held

    def _hold(self, request: Request) -> _Held:
        assert self._weight_version is not None
        if isinstance(request, GenerationRequest):
            return _Held(request, self._weight_version, time.time())
        if request.weight_version != self._weight_version:
            raise RuntimeError(
                f"sample {request.sample_id} was begun with weight version "
                f"{request.weight_version}, the engine has {self._weight_version}"
            )
        files = self._transfer.open(request) if self._transfer is not None else None
        return _Held(request.request, self._weight_version, request.started, request, files)

    def _abort(self, command: Abort) -> None:
        # A sample may have finished while the command was under way.
        tickets = [ticket for ticket in command.tickets if ticket in self._requests]
        self._engine.abort_request([str(ticket) for ticket in tickets])
        self._forget(tickets)

    def _extract(self, command: Extract) -> None:
        before = time.perf_counter()
        tickets = [ticket for ticket in command.tickets if ticket in self._requests]
        keys = {ticket: key for key, ticket in self._tickets.items()}
        ids = [keys[ticket] for ticket in tickets]
        requests = {t: self._core.scheduler.requests.get(keys[t]) for t in tickets}
        of_generators: Any = generator_states
        states: list[bytes | None] = self._engine.collective_rpc(of_generators, args=(ids,))[0]
        wanted = set(command.with_kv) & {
            t for t, request in requests.items() if request is not None
        }
        exported: dict[int, tuple[int, tuple[str, ...]]] = {}
        size = 0
        if self._transfer is not None and wanted:
            exported, size = self._transfer.export({t: requests[t] for t in sorted(wanted)})
        samples = tuple(
            (t, self._partial(t, keys[t], state, *exported.get(t, (0, ()))))
            for t, state in zip(tickets, states, strict=True)
        )
        self._engine.abort_request([str(ticket) for ticket in tickets])
        self._forget(tickets)
        self._outbox.put(Extracted(samples, time.perf_counter() - before, size))

    def _partial(
        self, ticket: int, key: str, generator: bytes | None, kv_tokens: int, files: tuple[str, ...]
    ) -> PartialSample:
        held = self._requests[ticket]
        state: Any = self._engine.output_processor.request_states[key]
        tokens = tuple(self._core.scheduler.requests[key].output_token_ids)
        drawn = state.logprobs_processor.logprobs
        if generator is None and held.before is not None:  # it has not run here
            generator = held.before.generator
        log_probs = (*held.log_probs, *(drawn.logprobs if drawn is not None else ()))
        return PartialSample(
            request=held.request,
            response=tokens,
            log_probs=log_probs,
            generator=generator if tokens else None,
            kv_tokens=kv_tokens,
            kv_files=files,
            weight_version=held.weight_version,
            started=held.started,
        )

    def _forget_exports(self) -> None:
        if self._transfer is not None:
            self._transfer.forget()

    def _free_cache(self) -> None:
        self._settle()
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache before its memory went")
        self._engine.collective_rpc(free_cache)

    def _step(self) -> None:
        before = time.perf_counter()
        ran = {request.request_id for request in self._core.scheduler.running}
        outputs = self._engine.step()
        if self._pace_s:
            time.sleep(max(0.0, before + self._pace_s - time.perf_counter()))
        seconds = time.perf_counter() - before
        self._window.add(seconds, len(self._core.scheduler.running))
        admitted = [r for r in self._core.scheduler.running if r.request_id not in ran]
        if admitted:
            self._prefill_seconds += seconds
            self._prefill_tokens += sum(map(self._computed, admitted))
        if self._transfer is not None and (resumed := self._transfer.take_resumed()):
            self._outbox.put(Resumed(*resumed))
        self._steps += 1
        samples = tuple((int(output.request_id), self._sample(output)) for output in outputs)
        if samples:
            self._forget([ticket for ticket, _ in samples])
            self._outbox.put(Finished(samples))
        # A parent that does not read gets no backlog of outdated observations.
        if self._window.age() >= PROGRESS_INTERVAL_S and self._outbox.empty:
            self._outbox.put(self._progress())
            self._window = _Window()

    def _computed(self, request: Any) -> int:
        """Tokens computed for a request that was admitted just now."""
        held = self._requests[self._tickets[request.request_id]]
        came = held.before.kv_tokens if held.before is not None and held.files is not None else 0
        return int(request.num_tokens) - came

    def _sample(self, output: Any) -> Sample:
        held = self._requests[int(output.request_id)]
        (completion,) = output.outputs  # of vLLM's RequestOutput
        tokens = (*held.response, *completion.token_ids)
        self._finished_tokens += len(tokens)
        return Sample(
            sample_id=held.request.sample_id,
            prompt=held.request.prompt,
            response=tokens,
            # Flat: one number per token.
            log_probs=(*held.log_probs, *completion.logprobs.logprobs),
            stop_reason=str(completion.finish_reason),
            weight_version=held.weight_version,
            instance=self._instance,
            started=held.started,
            finished=time.time(),
        )

    def _forget(self, tickets: list[int]) -> None:
        for ticket in tickets:
            files = self._requests.pop(ticket).files
            if files is not None:
                files.close()
        self._tickets = {key: t for key, t in self._tickets.items() if t in self._requests}

    def _progress(self) -> Progress:
        scheduler = self._core.scheduler
        lengths = {
            self._tickets[key]: request.num_output_tokens
            for key, request in scheduler.requests.items()
            if key in self._tickets
        }
        return Progress(
            time=time.time(),
            unfinished=tuple(
                (held.request.sample_id, lengths.get(ticket, 0))
                for ticket, held in self._requests.items()
            ),
            running=len(scheduler.running),
            waiting=len(self._requests) - len(scheduler.running),
            kv_usage=scheduler.kv_cache_manager.usage,
            steps=self._steps,
            output_tokens=self._finished_tokens + sum(lengths.values()),
            step_seconds=self._window.mean_seconds,
            step_sequences=self._window.mean_sequences,
            prefill_tokens=self._prefill_tokens,
            prefill_seconds=self._prefill_seconds,
        )

    def _update_weights(self, command: UpdateWeights) -> None:
        self._settle()
        if self._asleep:
            self._engine.wake_up(tags=["weights"])
        self._engine.collective_rpc("start_weight_update")
        for path in command.paths:
            self._engine.collective_rpc("update_weights", args=({"path": path},))
            self._outbox.put(BucketLoaded())
        self._engine.collective_rpc("finish_weight_update")
        if self._asleep:
            # Last, so that weights in transit and the KV cache are not in memory together.
            self._engine.wake_up(tags=["kv_cache"])
            self._asleep = False
        # Cached keys and values come from the old weights; used with new ones they give text that
        # neither would.
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache after a weight update")
        self._weight_version = command.version
        self._outbox.put(WeightsLoaded(command.version))

    def _sleep(self) -> None:
        self._settle()
        # Level 2 keeps no copy of the weights: the trainer brings newer ones.
        self._engine.sleep(level=2)
        self._asleep = True
        self._outbox.put(Asleep())

    def _settle(self) -> None:
        """Lets the scheduler give back the blocks of requests that ended in the last step."""
        if self._requests:
            raise RuntimeError(f"{len(self._requests)} samples are unfinished")
        while self._core.scheduler.has_requests() or self._core.batch_queue:
            self._engine.step()

    @property
    def _core(self) -> Any:
        in_process: Any = self._engine.engine_core
        return in_process.engine_core


@dataclass(frozen=True)
class _Held:
    request: GenerationRequest
    weight_version: int
    started: float
    before: PartialSample | None = None
    """What other engines made of it."""
    files: OpenFiles | None = None
    """Keys and values of that."""

    @property
    def response(self) -> tuple[int, ...]:
        return self.before.response if self.before is not None else ()

    @property
    def log_probs(self) -> tuple[float, ...]:
        return self.before.log_probs if self.before is not None else ()

    @property
    def kv_files(self) -> tuple[str, ...]:
        return self.files.paths if self.files is not None else ()


class _Window:
    """Means over the steps since the last observation."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._steps = self._sequences = 0
        self._seconds = 0.0

    def add(self, seconds: float, sequences: int) -> None:
        self._steps += 1
        self._seconds += seconds
        self._sequences += sequences

    def age(self) -> float:
        return time.monotonic() - self._since

    @property
    def mean_seconds(self) -> float:
        return self._seconds / self._steps

    @property
    def mean_sequences(self) -> float:
        return self._sequences / self._steps
