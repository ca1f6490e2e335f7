"""Tiny random Hugging Face models, and Megatron models of them in any layout, on test ranks."""

from __future__ import annotations

import functools
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhfuse import compat, platform
from megatron_rlhfuse.models.build import build_model
from megatron_rlhfuse.models.hf_config import Head, ModelShape, apply_shape, read_shape
from megatron_rlhfuse.models.load import load_hf_weights
from megatron_rlhfuse.pipeline.groups import Layout, ModelGroups, build_process_groups

VOCABULARY = 101  # odd, so that tensor parallelism has to pad it

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # far enough from zero for wrong places to show
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    # theta is so large that some wavelengths exceed 8192 and are scaled
    "llama3": ("Llama", {"rope_parameters": {**_LLAMA3, "rope_theta": 500000.0}}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
}


def make_hf_model(kind: str, head: Head, folder: Path) -> Any:
    """Saves a random model of one of KINDS; returns the transformers model, float32."""
    import transformers

    family, changes = KINDS[kind]
    config = getattr(transformers, f"{family}Config")(**{**_SMALL, **changes})
    suffix = "ForCausalLM"
    if head == "scalar":
        config.num_labels = 1
        suffix = "ForSequenceClassification"
    torch.manual_seed(len(kind))
    model = getattr(transformers, f"{family}{suffix}")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # they start as ones and zeros
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size="100KB")
    return model


def megatron_args(*flags: str) -> Namespace:
    """Validated Megatron arguments of a job on all ranks; the model's are filled in later."""
    from megatron.training.arguments import parse_args, validate_args

    given = "--num-layers 1 --hidden-size 8 --num-attention-heads 1 --seq-length 64"
    given += " --max-position-embeddings 64 --micro-batch-size 1 --lr 1e-3 --train-iters 1"
    given += " --rerun-mode disabled"
    command, sys.argv = sys.argv, ["test", *given.split(), *flags]
    try:
        args = parse_args()
    finally:
        sys.argv = command
    for name, value in (compat.default_flags() | platform.default_flags()).items():
        setattr(args, name, value)
    return validate_args(args)


def seed_megatron() -> None:
    """What Megatron's initialisation does besides groups: random streams, memory buffer."""
    from megatron.core import parallel_state, tensor_parallel

    if not parallel_state.is_initialized():
        parallel_state._set_global_memory_buffer()
    tensor_parallel.model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)


@functools.cache
def _groups(layout: Layout) -> ModelGroups | None:
    # Hundreds of groups of their own would take the test longer than all it checks.
    return build_process_groups(layout, f"tp{layout.tp}pp{layout.pp}")


class Built:
    """A model of a folder on this rank; `model` and `groups` are None without a part."""

    def __init__(
        self, args: Namespace, folder: Path, head: Head, layout: Layout, load: bool = True
    ) -> None:
        self.layout = layout
        self.shape: ModelShape = read_shape(folder, head)
        self.args = apply_shape(args, self.shape, layout.tp, layout.pp)
        self.groups: ModelGroups | None = _groups(layout)
        self.model: Any = None
        if self.groups is not None:
            self.model = build_model(self.args, self.groups, head)
            if load:
                load_hf_weights(self.model, folder, self.shape, self.groups)

    def run(
        self,
        batches: Sequence[Tensor],
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        model: Any = None,
    ) -> list[Any]:
        """Megatron's own schedule over micro-batches of tokens [batch, sequence].

        Without `loss` only forward: returns outputs on the last stage. With `loss(output,
        tokens)` forward and backward. Returns [] on other stages.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

        assert self.groups is not None
        pgc = self.groups.pgc

        def forward_step(iterator: Any, part: Any) -> tuple[Tensor, Callable[..., Any]]:
            tokens = next(iterator)
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            output = part(tokens, positions, None)

            def collect(output: Tensor, non_loss_data: bool = False) -> Any:
                if loss is None:
                    return output.detach().clone()
                found = loss(output, tokens)
                return found if isinstance(found, tuple) else (found, {})

            return output, collect

        schedule = get_forward_backward_func(pp_size=self.layout.pp, vp_size=None)
        return schedule(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=model or self.model,
            num_microbatches=len(batches),
            seq_length=batches[0].shape[1],
            micro_batch_size=batches[0].shape[0],
            forward_only=loss is None,
            collect_non_loss_data=loss is None,
            p2p_communicator=P2PCommunicator(pp_group=pgc.pp, config=self.model.config),
            pg_collection=pgc,
        )


def gather_columns(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Whole last axis from the shards of a tensor-parallel group."""
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return torch.cat(shards, dim=-1)
