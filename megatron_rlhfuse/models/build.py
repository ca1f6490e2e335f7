"""GPTModel on this rank from Megatron arguments, and its wrapping for training.

Invariants
- A model asks its own process groups where it is, never Megatron's `parallel_state`.
- Parameters come out of `build_model` uninitialised: load.py fills every one of them exactly
  once. No rank ever makes a whole weight to cut its part from.
"""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from megatron_rlhfuse import platform
from megatron_rlhfuse.models.hf_config import Head
from megatron_rlhfuse.pipeline.groups import ModelGroups

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig


def build_model(
    args: Namespace, groups: ModelGroups, head: Head, packs_sequences: bool = False
) -> GPTModel:
    """Builds this rank's stage of a model, in the parameter dtype of `args`, on this device.

    Collective over the ranks of the layout. The model is not wrapped: `model.config` is its own
    TransformerConfig. Logits come in the parameter dtype, values in float32.

    Args:
        args: Megatron arguments of this model, from `hf_config.apply_shape`
        head: "language" for logits [batch, sequence, vocabulary / tp], "scalar" for [.., 1]
        packs_sequences: batches may be packed
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel import (
        set_defaults_if_not_set_tensor_model_parallel_attributes,
    )

    _check_sizes(args, groups)
    config = _transformer_config(args)
    tied = head == "language" and not args.untie_embeddings_and_output_weights
    model = GPTModel(
        config=config,
        transformer_layer_spec=_layer_spec(args, packs_sequences),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=tied,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        pg_collection=groups.pgc,
    )
    if head == "scalar" and groups.is_last_stage:
        from megatron_rlhfuse.models.scalar_head import ScalarHead

        model.output_layer = ScalarHead(config, groups)
    # Float16Module would do the same and turn all logits into float32: logits.py does that for
    # the columns and at the time it needs them.
    model.to(device=platform.device(), dtype=args.params_dtype)
    for parameter in model.parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    return model


def wrap_for_training(
    model: GPTModel, args: Namespace, config: TransformerConfig, groups: ModelGroups
) -> DistributedDataParallel:
    """Wraps a loaded model in Megatron's DDP, set up as Megatron's own training loop does.

    Collective over the data-parallel group. The trainer sets `no_sync_func`, `grad_scale_func`
    and `finalize_model_grads_func` on `config`.
    """
    from megatron.training.training import (
        get_megatron_ddp_config,
        resolve_ddp_bucket_size,
        wrap_model_chunks_with_ddp,
    )

    ddp_config = get_megatron_ddp_config(args)
    ddp_config.bucket_size = resolve_ddp_bucket_size(
        ddp_config,
        groups.pgc.dp_cp,
        ddp_config.overlap_grad_reduce,
        sum(parameter.nelement() for parameter in model.parameters()),
    )
    # Only the first stage reduces gradients on the critical path, so only it gets buckets.
    bucket_size = ddp_config.bucket_size if groups.is_first_stage else None
    (wrapped,) = wrap_model_chunks_with_ddp(
        [model],
        config,
        ddp_config,
        pg_collection=groups.pgc,
        bucket_sizes=[bucket_size],
        disable_bucketing_per_chunk=[args.overlap_param_gather_with_optimizer_step],
    )
    wrapped.broadcast_params()
    return wrapped


def _check_sizes(args: Namespace, groups: ModelGroups) -> None:
    described = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
    present = (groups.layout.tp, groups.layout.pp)
    if described != present:
        raise ValueError(
            f"model {groups.name}: arguments say (tensor, pipeline) = {described}, its process "
            f"groups {present}; use apply_shape with the sizes of the layout"
        )
    if args.sequence_parallel and args.transformer_impl == "local":
        raise ValueError("--sequence-parallel needs --transformer-impl transformer_engine")


def _transformer_config(args: Namespace) -> TransformerConfig:
    from megatron.training.argument_utils import core_transformer_config_from_args

    config = core_transformer_config_from_args(args)
    config.perform_initialization = False
    # Megatron's argument check turns this off; micro-batches of responses differ in length.
    config.variable_seq_lengths = True
    if args.transformer_impl == "local":
        config.persist_layer_norm = False  # torch's RMSNorm has no such kernel and says so
    return config


def _layer_spec(args: Namespace, packs_sequences: bool) -> ModuleSpec:
    from megatron.core.models.gpt import gpt_layer_specs

    if args.transformer_impl == "transformer_engine":
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=args.qk_layernorm
        )
    if args.transformer_impl == "local":
        spec = gpt_layer_specs.get_gpt_layer_local_spec(
            qk_layernorm=args.qk_layernorm, normalization=args.normalization
        )
        if packs_sequences:
            from megatron_rlhfuse.models.packed_attention import PackedAttention

            spec.submodules.self_attention.submodules.core_attention = PackedAttention
        return spec
    raise ValueError(
        f"--transformer-impl {args.transformer_impl}: use transformer_engine, or local"
    )
