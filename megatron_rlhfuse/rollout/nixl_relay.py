"""Keys and values from node to node by NIXL: over InfiniBand, RoCE or what else UCX finds there.

The source registers its files where they lie in memory; the destination reads them from there. The
process group carries only what that takes: sizes, addresses, and how to reach the source.

Invariants
- what was offered stays mapped and registered until `forget`: UCX may read an address that is not
  registered any more, whatever lies there by then;
- a read that fails, or takes too long, costs the sample its files, and so do all later ones from
  the same source until `forget`: one that hangs is waited for once;
- a read that was given up keeps its memory, and its source is not read from, until it has ended:
  UCX cannot call it off, and the bytes may still come.

Errors of the process group are raised: a rank that is gone ends the job.
"""

from __future__ import annotations

import importlib
import logging
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhfuse.rollout.kv_relay import GlooRelay

logger = logging.getLogger(__name__)

_POLL_S = 0.0002

# How long UCX's thread sleeps when nothing happens; without it, it takes a core for itself.
_IDLE_US = 1000


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
        self._offered: list[tuple[Any, Tensor]] = []
        self._sources: dict[int, bytes] = {}
        """Instances that this one is connected to, and their agents."""
        self._failed: set[int] = set()
        """Instances that a file could not be read from."""
        self._given_up: dict[int, tuple[int, Any, Tensor]] = {}
        """By instance: the read from it that has not ended."""

    def forget(self) -> None:
        """Frees what was received and what was offered, once all destinations have read it."""
        super().forget()
        for source in [each for each in self._given_up if self._has_ended(each)]:
            request, regions, _ = self._given_up.pop(source)
            self._agent.releaseXferReq(request)
            self._deregister(regions)
        self._failed = set(self._given_up)
        for source in self._sources.keys() - self._failed:
            # What it offers next may lie at the same addresses.
            self._agent.invalidateRemoteMD(self._sources.pop(source))
        while self._offered:
            self._deregister(self._offered.pop()[0])

    def _offer(self, image: Tensor, destination: int) -> None:
        ticket = b""
        try:
            regions = self._register(image)
            self._offered.append((regions, image))
            ticket = self._agent.getLocalPartialMD(regions, True, self._backends)
        except Exception as error:  # NIXL's errors have no class in common
            logger.warning(
                "keys and values of a sample stay here, its tokens are computed again: NIXL "
                "cannot register %d bytes (%r; is the limit of locked memory, ulimit -l, too low?)",
                len(image),
                error,
            )
        self._begin(torch.tensor([image.data_ptr(), len(ticket)]), destination)
        if ticket:
            self._begin(torch.frombuffer(bytearray(ticket), dtype=torch.uint8), destination)

    def _fetch(self, size: int, source: int) -> Tensor | None:
        head = torch.zeros(2, dtype=torch.int64)
        self._wait_for(head, source)
        address, length = head.tolist()
        if not length:
            return None
        ticket = torch.empty(length, dtype=torch.uint8)
        self._wait_for(ticket, source)
        if source in self._failed:
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
        return image

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
            status = agent.postXferReq(request)
            while status == nixl.NIXL_IN_PROG:
                if time.monotonic() > deadline:
                    self._given_up[source] = request, regions, image
                    raise TimeoutError(f"not within {self._limit_s:g} s")
                time.sleep(_POLL_S)
                status = agent.getXferStatus(request)
        finally:
            if source not in self._given_up:
                if request is not None:
                    agent.releaseXferReq(request)
                self._deregister(regions)

    def _has_ended(self, source: int) -> bool:
        request, _, _ = self._given_up[source]
        try:
            return bool(self._agent.getXferStatus(request) != self._nixl.NIXL_IN_PROG)
        except Exception:  # with an error; nobody waits for it any more
            return True

    def _register(self, image: Tensor) -> Any:
        nixl = self._nixl
        regions = nixl.nixlRegDList(nixl.DRAM_SEG, [(image.data_ptr(), len(image), 0, "")])
        self._agent.registerMem(regions, self._backends)
        return regions

    def _deregister(self, regions: Any) -> None:
        self._agent.deregisterMem(regions, self._backends)


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
