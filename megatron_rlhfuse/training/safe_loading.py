"""Checkpoints are read without running code that they bring along.

Torch's reader of distributed checkpoints unpickles the table of contents (`.metadata`) and every
object that is no tensor: a checkpoint from elsewhere could run anything. Here both may build only
what a checkpoint consists of; anything else is an error that names it. Megatron's own `common.pt`
of older checkpoints is read with torch's weights-only reader already.
"""

from __future__ import annotations

import io
import pickle
import types
from typing import IO, Any

import torch

_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"

_CONTENTS = {
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        (_METADATA, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *((_PLANNER, name) for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
}


class _TableOfContents(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _CONTENTS:
            raise pickle.UnpicklingError(
                f"its .metadata asks for {module}.{name}, which no checkpoint needs: it may be "
                "made to run code"
            )
        return super().find_class(module, name)


def install() -> None:
    """Makes torch's reader of distributed checkpoints safe. Idempotent."""
    from torch.distributed.checkpoint import default_planner, filesystem

    reader: Any = filesystem
    reader.pickle = types.SimpleNamespace(dump=pickle.dump, load=_load_contents)
    planner: Any = default_planner.DefaultLoadPlanner
    planner.load_bytes = _load_object


def _load_contents(file: IO[bytes]) -> Any:
    return _TableOfContents(file).load()


def _load_object(self: Any, read_item: Any, value: io.BytesIO) -> None:
    """As DefaultLoadPlanner.load_bytes, but for what a weights-only load refuses to build.

    Megatron has named its own classes to that.
    """
    from torch.distributed.checkpoint._traverse import set_element

    name = read_item.dest_index.fqn
    loaded = torch.load(value, weights_only=True)
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded
