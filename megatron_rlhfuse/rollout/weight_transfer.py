"""The receiving end of a weight update: vLLM's weight-transfer interface over shared memory.

Each worker maps the trainer's sealed buckets (see weight_buckets) and feeds them to vLLM's
layer-wise reload, which builds a layer as soon as its last tensor is there and copies it into
the storage the running engine uses; a worker of a tensor-parallel engine takes its shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    """One bucket."""

    path: str
    """A safetensors image that this process may open."""


class SharedMemoryWeightTransferEngine(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):
    """Loads buckets that the trainer wrote on the same host."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        """No connection to open: every update names its own memory."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        """Load one bucket.

        Raises:
            ValueError: a tensor does not fit the model; names it and its shape.
        """
        current = ("", torch.Size())

        def stream() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal current
            with safe_open(update_info.path, framework="pt", device="cpu") as bucket:
                for name in bucket.offset_keys():
                    tensor = bucket.get_tensor(name)
                    current = (name, tensor.shape)
                    yield name, tensor

        model: Any = self.model  # every vLLM model has load_weights
        try:
            model.load_weights(stream())
        except Exception as error:
            name, shape = current
            raise ValueError(
                f"weight {name} of shape {list(shape)} does not fit the model: {error!r}"
            ) from error

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        _process_tied_layers(self.model)

    def shutdown(self) -> None:
        """Nothing is held between updates."""


def _process_tied_layers(model: torch.nn.Module) -> None:
    """Bring layers up to date that got no tensor of their own because their weight is tied.

    The reload passes them over, yet on CPU an output layer computes with a packed copy of its
    weight, made by `process_weights_after_loading`: without this the logits of a model with tied
    embeddings keep coming from the old weights.
    """
    seen: set[int] = set()
    for layer in model.modules():
        own = {id(parameter) for parameter in layer.parameters(recurse=False)}
        method = getattr(layer, "quant_method", None)
        if own and own <= seen and isinstance(method, QuantizeMethodBase):
            method.process_weights_after_loading(layer)
        seen |= own


def weight_names(model: torch.nn.Module) -> list[str]:
    """Hugging Face names of the tensors that make up a vLLM model, each once.

    vLLM fuses some of them (q, k and v; gate and up) and says so in `packed_modules_mapping`; all
    others keep their names in the dense decoders this project trains. Tied weights count once.
    """
    packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    names = []
    for name, _ in model.named_parameters():
        *path, module, leaf = name.split(".")
        names += [".".join([*path, part, leaf]) for part in packed.get(module, [module])]
    return names
