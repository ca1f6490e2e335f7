"""Keys and values from node to node by NIXL: over InfiniBand, RoCE or what else UCX finds there.

The source registers its files where they lie in memory; the destination reads them from there. The
process group carries only what that takes: sizes, addresses, how to reach the source, and for
every offer an answer: whether its memory may still be read.

Invariants
- what was offered stays mapped and registered until `forget` has its answer: UCX may read an
  address that is not registered any more, whatever lies there by then;
- a read that fails, or takes too long, costs the sample its files, and so do all later ones from
  the same source until `forget`: one that hangs is waited for once;
- a read that was given up keeps its memory, and its source is not read from, until it has ended:
  UCX cannot call it off, and the bytes may still come. On the source, which nobody tells of that
  end, the file stays for the rest of the job: reads are seldom given up;
- memory that NIXL does not let go of stays for the rest of the job, and the job goes on;
- `forget` waits for answers and never until one is taken: of two that give each other samples
  neither waits for what the other does after `receive`. So a rank must live until all have
  forgotten.

Errors of the process group are raised: a rank that is gone ends the job.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections import defaultdict
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhfuse.pipeline.broadcast import require_sizes
from megatron_rlhfuse.rollout.kv_relay import GlooRelay

logger = logging.getLogger(__name__)

_POLL_S = 0.0002

# How long UCX's thread sleeps when nothing happens; without it, it takes a core for itself.
_IDLE_US = 1000

# Answers pass what else is on its way to the same rank.
_ANSWER_TAG = 1


class NixlRelay(GlooRelay):
    """One per rank that leads an instance."""

    def __init__(self, group: dist.ProcessGroup, ranks_per_instance: int, limit_s: float) -> None:
        """limit_s: longest read of a file. Raises ImportError where NIXL is missing."""
        super().__init__(group, ranks_per_instance)
        self._limit_s = limit_s
        self._nixl = _import_nixl()
        config = self._nixl.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = True, _IDLE_US
        self._agent = self._nixl.nixlAgent(f"rank-{dist.get_rank(group)}", config)
        self._backends = [self._agent.createBackend("UCX", {})]
        self._offered: defaultdict[int, list[tuple[Any, Tensor]]] = defaultdict(list)
        """By destination: what it has not answered yet, in order."""
        self._answers: defaultdict[int, list[tuple[dist.Work | None, Tensor]]] = defaultdict(list)
        """By source: what it has perhaps not taken yet."""
        self._kept: list[Tensor] = []
        """Never freed: UCX may use it until the job ends."""
        self._sources: dict[int, bytes] = {}
        """Instances that this one is connected to, and their agents."""
        self._failed: set[int] = set()
        """Instances that a file could not be read from."""
        self._unfinished: dict[int, tuple[Any, Tensor, Any]] = {}
        """By instance: the read from it that has not ended, or not well."""

    def forget(self) -> None:
        """Frees what was received and what was offered, once all destinations have read it.

        What a destination has given up is not freed. Logs NIXL's errors.
        """
        super().forget()
        for destination, offers in self._offered.items():
            for regions, image in offers:
                self._forget_offer(regions, image, destination)
        self._offered.clear()
        for source in [each for each in self._unfinished if self._has_ended(each)]:
            self._free(*self._unfinished.pop(source))
        self._failed = set(self._unfinished)
        for source in self._sources.keys() - self._failed:
            self._disconnect(source)

    def _offer(self, image: Tensor, destination: int) -> None:
        ticket, regions = b"", None
        try:
            regions = self._register(image)
            ticket = self._agent.getLocalPartialMD(regions, True, self._backends)
        except Exception as error:  # NIXL's errors have no class in common
            logger.warning(
                "keys and values of a sample stay here, its tokens are computed again: NIXL "
                "cannot register %d bytes (%r; is the limit of locked memory, ulimit -l, too low?)",
                len(image),
                error,
            )
            if regions is not None:
                self._free(regions, image)
        offers = self._offered[destination]
        self._begin(torch.tensor([image.data_ptr(), len(ticket), len(offers)]), destination)
        if ticket:
            offers.append((regions, image))
            self._begin(torch.frombuffer(bytearray(ticket), dtype=torch.uint8), destination)

    def _forget_offer(self, regions: Any, image: Tensor, destination: int) -> None:
        still_read = torch.empty(1, dtype=torch.uint8)
        dist.recv(still_read, destination * self._block, self._group, tag=_ANSWER_TAG)
        if not still_read:
            self._free(regions, image)
            return
        self._kept.append(image)
        logger.warning(
            "%d bytes stay in memory for the rest of the job: instance %d has given up reading "
            "them, and the read may still go on",
            len(image),
            destination,
        )

    def _fetch(self, size: int, source: int) -> Tensor | None:
        head = torch.zeros(3, dtype=torch.int64)
        self._wait_for(head, source)
        address, length, unanswered = head.tolist()
        self._drop_answers(source, unanswered)
        require_sizes([length], f"tickets of files from instance {source}")
        if not length:
            return None
        ticket = torch.empty(length, dtype=torch.uint8)
        self._wait_for(ticket, source)
        if source in self._failed:
            self._answer(source, False)  # this one is not begun
            return None
        image = torch.empty(size, dtype=torch.uint8)
        try:
            self._read(image, source, address, ticket.numpy().tobytes())
        except Exception as error:  # as above
            self._failed.add(source)
            logger.warning(
                "keys and values from instance %d do not arrive, tokens are computed again: NIXL "
                "could not read %d bytes (%r)",
                source,
                size,
                error,
            )
            return None
        finally:
            self._answer(source, source in self._unfinished)
        return image

    def _answer(self, source: int, still_read: bool) -> None:
        """Tells a source whether what it offered may still be read.

        Gloo sends when the other side wants to receive, here in its `forget`, which may be later
        than the one of this rank: nobody waits for that.
        """
        answer = torch.tensor([still_read], dtype=torch.uint8)
        with suppress(RuntimeError):  # the source is gone and frees nothing; others notice
            work = dist.isend(answer, source * self._block, self._group, tag=_ANSWER_TAG)
            self._answers[source].append((work, answer))

    def _drop_answers(self, source: int, unanswered: int) -> None:
        """unanswered: offers that the source has no answer to; it has taken all earlier ones."""
        answers = self._answers[source]
        while len(answers) > unanswered:
            work, _ = answers.pop(0)
            if work is not None:
                work.wait()

    def _read(self, image: Tensor, source: int, address: int, ticket: bytes) -> None:
        """Reads from an address of the source. Raises NIXL's errors, and TimeoutError."""
        nixl, agent = self._nixl, self._agent
        deadline = time.monotonic() + self._limit_s
        name = self._sources[source] = agent.loadRemoteMD(ticket)
        regions = self._register(image)
        here = nixl.nixlXferDList(nixl.DRAM_SEG, [(image.data_ptr(), len(image), 0)])
        there = nixl.nixlXferDList(nixl.DRAM_SEG, [(address, len(image), 0)])
        request = None
        try:
            request = agent.createXferReq(nixl.NIXL_READ, here, there, name, "", self._backends)
            self._unfinished[source] = regions, image, request
            status = agent.postXferReq(request)
            while status == nixl.NIXL_IN_PROG:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not within {self._limit_s:g} s")
                time.sleep(_POLL_S)
                status = agent.getXferStatus(request)
            del self._unfinished[source]
        finally:
            if source not in self._unfinished:
                self._free(regions, image, request)

    def _has_ended(self, source: int) -> bool:
        *_, request = self._unfinished[source]
        try:
            return bool(self._agent.getXferStatus(request) != self._nixl.NIXL_IN_PROG)
        except Exception:  # with an error; nobody waits for it any more
            return True

    def _disconnect(self, source: int) -> None:
        """What it offers next may lie at the same addresses."""
        try:
            self._agent.invalidateRemoteMD(self._sources.pop(source))
        except Exception as error:  # as above
            logger.warning("NIXL does not forget what instance %d has offered (%r)", source, error)

    def _register(self, image: Tensor) -> Any:
        nixl = self._nixl
        regions = nixl.nixlRegDList(nixl.DRAM_SEG, [(image.data_ptr(), len(image), 0, "")])
        self._agent.registerMem(regions, self._backends)
        return regions

    def _free(self, regions: Any, image: Tensor, request: Any = None) -> None:
        """Ends a read and NIXL's use of memory; where that fails, the memory is kept."""
        try:
            if request is not None:
                self._agent.releaseXferReq(request)
            self._agent.deregisterMem(regions, self._backends)
        except Exception as error:  # as above
            self._kept.append(image)
            logger.warning(
                "%d bytes stay in memory for the rest of the job: NIXL does not let go of them "
                "(%r)",
                len(image),
                error,
            )


def _import_nixl() -> Any:
    """NIXL's own bindings: its Python class does not let UCX's thread sleep."""
    # UCX would catch SIGHUP, by which a launcher or a terminal ends a rank.
    os.environ.setdefault("UCX_DEBUG_SIGNO", "0")
    try:
        return importlib.import_module("nixl._bindings")
    except ImportError as error:
        raise ImportError(
            "--rlhfuse-migration-relay nixl needs the packages nixl and nixl-cu13 (nixl-cu12 with "
            f"a torch for CUDA 12): install them, or use gloo ({error})"
        ) from error
