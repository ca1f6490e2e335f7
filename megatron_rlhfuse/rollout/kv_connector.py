"""Keys and values of running requests, out of one vLLM engine and into another.

vLLM's way in for foreign KV blocks is a connector; this one only takes in. Blocks go out between
two steps, by `export_blocks` in every worker, so that a request's tokens, generator and blocks
are of one moment.

Invariants:
- blocks travel whole, into blocks of the same size, dtype and tensor-parallel shard: bit for bit
  what the first engine computed;
- all but the last token so far is imported, so exactly one token is computed again;
- a file is opened and checked when the request is submitted, before anything depends on it. One
  that cannot be used is left out: the tokens are computed again, as without files;
- imported blocks are read once, synchronously, in the step that schedules the request first.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
)

from megatron_rlhfuse.rollout.memory_file import (
    KEYS_AND_VALUES,
    open_memory_file,
    path_of,
    write_tensors,
)
from megatron_rlhfuse.rollout.resumption import FILES, TOKENS, is_resumed
from megatron_rlhfuse.rollout.samples import PartialSample

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig


def transfer_config() -> KVTransferConfig:
    """Makes an engine use the connector."""
    from vllm.config import KVTransferConfig

    return KVTransferConfig(
        kv_connector=BlockImporter.__name__,
        kv_connector_module_path=__name__,
        kv_role="kv_both",
    )


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Import:
    files: tuple[str, ...]
    blocks: tuple[int, ...]
    first: int
    """Position in the files of what goes into the first of `blocks`; what stands before was in the
    prefix cache."""


@dataclass
class _Imports(KVConnectorMetadata):
    requests: list[_Import] = field(default_factory=list)


class BlockImporter(KVConnectorBase_V1):
    """Loads the blocks of requests that come with files. One in the scheduler, one per worker."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._block_size: int = vllm_config.cache_config.block_size
        self._due: dict[str, _Import] = {}
        self._caches: dict[str, torch.Tensor] = {}
        self._blocks: int = kv_cache_config.num_blocks if kv_cache_config is not None else 0
        self.resumed = 0
        self.recomputed = 0
        """Requests of other engines that were scheduled first, and the tokens computed for that."""

    # In the scheduler.

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        parameters = request.kv_transfer_params or {}
        # A request that was preempted has lost its blocks, and goes on as any other.
        if FILES not in parameters or request.num_preemptions:
            return 0, False
        return max(0, parameters[TOKENS] - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens == 0:
            return
        tokens = request.kv_transfer_params[TOKENS]
        first = (tokens - num_external_tokens) // self._block_size
        (ids,) = blocks.get_block_ids()
        self._due[request.request_id] = _Import(
            tuple(request.kv_transfer_params[FILES]),
            tuple(ids[first : -(-tokens // self._block_size)]),
            first,
        )

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        tokens = scheduler_output.num_scheduled_tokens
        for request in scheduler_output.scheduled_new_reqs:
            if is_resumed(request.sampling_params):
                self.resumed += 1
                self.recomputed += tokens[request.req_id]
        scheduled = [key for key in self._due if key in tokens]
        return _Imports([self._due.pop(key) for key in scheduled])

    # In a worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._caches = kv_caches

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        imports = self._get_connector_metadata()
        assert isinstance(imports, _Imports)
        for each in imports.requests:
            # What fails here, though it was checked, ends the engine: vLLM would compute the blocks
            # again, but the request's generator would have made a draw too many.
            self._load(each)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Everything is there before the first layer runs."""

    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None:
        """Nothing goes out while the model runs."""

    def wait_for_save(self) -> None:
        """As above."""

    def export(self, requests: Sequence[Sequence[int]]) -> list[int]:
        """Copies the blocks of requests into memory files; returns their descriptors."""
        return [
            write_tensors(
                [
                    (name, cache.index_select(self._axis(cache), self._index(blocks, cache)).cpu())
                    for name, cache in self._caches.items()
                ],
                KEYS_AND_VALUES,
            )
            for blocks in requests
        ]

    def _load(self, each: _Import) -> None:
        path = each.files[_tensor_parallel_rank()]
        with safe_open(path, framework="pt", device="cpu") as file:
            for name, cache in self._caches.items():
                axis = self._axis(cache)
                blocks = file.get_tensor(name).narrow(axis, each.first, len(each.blocks))
                cache.index_copy_(axis, self._index(each.blocks, cache), blocks.to(cache.device))

    def _axis(self, cache: torch.Tensor) -> int:
        """The dimension of a layer's cache that counts blocks; attention backends differ."""
        return list(cache.shape).index(self._blocks)

    @staticmethod
    def _index(blocks: Sequence[int], cache: torch.Tensor) -> torch.Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=cache.device)


def export_blocks(worker: object, requests: Sequence[Sequence[int]]) -> tuple[int, list[int]]:
    """Runs in a worker: its pid, and a descriptor for each request's blocks."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    connector = get_kv_transfer_group()
    assert isinstance(connector, BlockImporter)
    return os.getpid(), connector.export(requests)


def close_files(worker: object, descriptors: Sequence[Sequence[int]]) -> None:
    """Runs in a worker: frees what `export_blocks` made there. descriptors: by worker."""
    for descriptor in descriptors[_tensor_parallel_rank()]:
        os.close(descriptor)


def cache_size(worker: Any) -> int:
    """Runs in a worker: bytes of its KV cache."""
    return sum(storage.nbytes() for storage in _storages(worker))


def free_cache(worker: Any) -> int:
    """Runs in a worker on a CPU: gives the pages of the KV cache back; returns their bytes.

    What the cache held is lost; a page that is touched again comes back as zeros.
    """
    import ctypes

    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    page = os.sysconf("SC_PAGESIZE")
    freed = 0
    for storage in _storages(worker):
        begin = -(-storage.data_ptr() // page) * page
        size = (storage.data_ptr() + storage.nbytes() - begin) // page * page
        dont_need = 4
        if size > 0 and madvise(begin, size, dont_need) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"madvise: {os.strerror(error)}")
        freed += max(0, size)
    return freed


def _storages(worker: Any) -> list[torch.UntypedStorage]:
    caches = (cache.untyped_storage() for cache in worker.model_runner.kv_caches)
    return list({storage.data_ptr(): storage for storage in caches}.values())


class OpenFiles:
    """Files of a request, held open from its submission until it is over.

    Whoever wrote them may end in between.
    """

    def __init__(self, paths: Sequence[str], blocks: int) -> None:
        """Raises OSError, SafetensorError or ValueError for a file that cannot be used: it is
        gone, no whole image, or one of another number of blocks."""
        self._descriptors: list[int] = []
        try:
            for path in paths:
                descriptor = open_memory_file(path, KEYS_AND_VALUES)
                self._descriptors.append(descriptor)
                with safe_open(path_of(descriptor), framework="pt", device="cpu") as file:
                    for name in file.offset_keys():
                        shape = file.get_slice(name).get_shape()
                        if blocks not in shape:
                            raise ValueError(f"{name} is {shape}, without {blocks} blocks")
        except BaseException:
            self.close()
            raise

    @property
    def paths(self) -> tuple[str, ...]:
        """For the workers."""
        return tuple(path_of(descriptor) for descriptor in self._descriptors)

    def close(self) -> None:
        """Idempotent."""
        while self._descriptors:
            with suppress(OSError):
                os.close(self._descriptors.pop())


Files = tuple[int, tuple[str, ...]]
"""How many tokens' keys and values, and a file for each worker."""


class KVTransfer:
    """Blocks out of this engine, and files into it; in the engine process."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._exports: list[list[tuple[int, list[int]]]] = []
        """By export and worker: its pid, its descriptors."""

    def export(self, requests: dict[int, Any]) -> tuple[dict[int, Files], int]:
        """(tokens, files) of requests, and the bytes in all. Some may be missing: nothing is
        computed of them yet, or their blocks are of several kinds."""
        core = self._engine.engine_core.engine_core
        blocks: dict[int, tuple[int, list[int]]] = {}
        for key, request in requests.items():
            tokens = min(request.num_computed_tokens, request.num_tokens - 1)
            groups = core.scheduler.kv_cache_manager.get_block_ids(request.request_id)
            if tokens > 0 and len(groups) == 1:
                size = core.vllm_config.cache_config.block_size
                blocks[key] = tokens, groups[0][: -(-tokens // size)]
        if not blocks:
            return {}, 0
        workers = self._engine.collective_rpc(
            export_blocks, args=([ids for _, ids in blocks.values()],)
        )
        self._exports.append(workers)
        files = {
            key: (
                tokens,
                tuple(f"/proc/{pid}/fd/{descriptors[i]}" for pid, descriptors in workers),
            )
            for i, (key, (tokens, _)) in enumerate(blocks.items())
        }
        return files, sum(os.stat(path).st_size for _, paths in files.values() for path in paths)

    def open(self, sample: PartialSample) -> OpenFiles | None:
        """The files of a sample that goes on here; None for one without, or with unusable ones."""
        if not sample.kv_files:
            return None
        size = self._engine.engine_core.engine_core.vllm_config.cache_config.block_size
        try:
            return OpenFiles(sample.kv_files, -(-sample.kv_tokens // size))
        except (OSError, SafetensorError, ValueError) as error:
            logger.warning(
                "sample %d: its keys and values cannot be read (%s); they are computed again",
                sample.sample_id,
                error,
            )
            return None

    def take_resumed(self) -> tuple[int, int] | None:
        """Samples of other engines that began to run since the last call, and the tokens that were
        computed again for it; None if there were none."""
        importer = self._engine.engine_core.engine_core.scheduler.connector
        taken = importer.resumed, importer.recomputed
        importer.resumed = importer.recomputed = 0
        return taken if taken[0] else None

    def forget(self) -> None:
        """Frees what was exported."""
        for workers in self._exports:
            self._engine.collective_rpc(close_files, args=([files for _, files in workers],))
        self._exports = []


def _tensor_parallel_rank() -> int:
    from vllm.distributed import get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank()
