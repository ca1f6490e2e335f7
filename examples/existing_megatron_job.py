"""A plain Megatron-Core job: two language models, trained one after the other in every step.

    torchrun --nproc-per-node 4 examples/existing_megatron_job.py --pipeline 4

It runs on GPUs with NCCL and on CPUs with Gloo. `fused.patch`, beside it, changes three lines: both
models then train at once, in one fused pipeline, and get the same losses and the same weights.

    git apply examples/fused.patch
"""

from __future__ import annotations

import logging
import os
import time
import zlib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection as Groups
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import Module

from megatron_rlhfuse import platform

NAMES = ("first", "second")
VOCABULARY = 512
SEQUENCE = 64
MICRO_BATCH_SIZE = 2

LossFunction = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


def main() -> None:
    args = parse_args()
    logging.getLogger("megatron").setLevel(logging.ERROR)  # else it lists every parameter
    platform.prepare()  # where there is no GPU, lets Megatron run on the CPU
    platform.set_up_rank(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(platform.backend())
    parallel_state.initialize_model_parallel(args.tensor, args.pipeline)
    groups = Groups.use_mpu_process_groups()
    second_groups = groups
    both_groups = [groups, second_groups]
    models = [build_model(args, m, both_groups[m]) for m in (0, 1)]
    optimizers = [build_optimizer(models[m], both_groups[m]) for m in (0, 1)]
    channels = [P2PCommunicator(both_groups[m].pp, models[m].config) for m in (0, 1)]

    began = time.perf_counter()
    for step in range(args.steps):
        for m in (0, 1):
            models[m].zero_grad_buffer()
            optimizers[m].zero_grad()
        both = {
            "forward_step_func": [forward_step, forward_step],
            "data_iterator": [mock_data(args, step, m, both_groups[m]) for m in (0, 1)],
            "model": models,
            "num_microbatches": [args.micro_batches, args.micro_batches],
            "seq_length": [SEQUENCE, SEQUENCE],
            "micro_batch_size": [MICRO_BATCH_SIZE, MICRO_BATCH_SIZE],
            "p2p_communicator": channels,
            "pg_collection": both_groups,
        }
        losses = [get_forward_backward_func()(**{k: v[m] for k, v in both.items()}) for m in (0, 1)]
        for m in (0, 1):
            optimizers[m].step()
            report(step, m, losses[m], both_groups[m])
    platform.synchronize()
    seconds = time.perf_counter() - began

    for m in (0, 1):
        total = checksum(models[m])
        if dist.get_rank() == 0:
            print(f"{NAMES[m]} model: weights {total}", flush=True)
    if dist.get_rank() == 0:
        print(f"{seconds / args.steps:.3f} s per step", flush=True)
    dist.destroy_process_group()


def parse_args() -> Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--micro-batches", type=int, default=8, help="of a replica, in a step")
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel size")
    parser.add_argument("--pipeline", type=int, default=4, help="pipeline stages")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size")
    parser.add_argument("--layers", type=int, default=8)
    return parser.parse_args()


def build_model(args: Namespace, number: int, groups: Groups) -> DistributedDataParallel:
    # The seed names the model and the stage, not the rank: a model starts from the same weights
    # wherever its stages stand.
    seed = 1000 * (number + 1) + groups.pp.rank()
    tensor_parallel.model_parallel_cuda_manual_seed(seed, tp_rank=groups.tp.rank())
    config = TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_attention_heads=4,
        normalization="RMSNorm",
        tensor_model_parallel_size=args.tensor,
        pipeline_model_parallel_size=args.pipeline,
        pipeline_dtype=torch.float32,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    config.finalize_model_grads_func = finalize_model_grads
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        pre_process=groups.pp.rank() == 0,
        post_process=groups.pp.rank() == groups.pp.size() - 1,
        position_embedding_type="rope",
        pg_collection=groups,
    ).to(platform.device())
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    return DistributedDataParallel(config, ddp_config, model, pg_collection=groups)


def build_optimizer(model: DistributedDataParallel, groups: Groups) -> MegatronOptimizer:
    config = OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.01, clip_grad=1.0)
    return get_megatron_optimizer(
        config, [model], use_gloo_process_groups=False, pg_collection=groups
    )


def mock_data(args: Namespace, step: int, number: int, groups: Groups) -> Iterator[Tensor]:
    """Tokens of every micro-batch, [batch, sequence + 1]; they differ between replicas."""
    generator = torch.Generator().manual_seed(10000 * step + 100 * number + groups.dp.rank())
    shape = (MICRO_BATCH_SIZE, SEQUENCE + 1)
    for _ in range(args.micro_batches):
        yield torch.randint(VOCABULARY, shape, generator=generator).to(platform.device())


def forward_step(data_iterator: Iterator[Tensor], model: Module) -> tuple[Tensor, LossFunction]:
    tokens = next(data_iterator)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)

    def loss_func(token_losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss = token_losses.float().mean()
        return loss, {"loss": loss.detach().clone()}

    return model(inputs, positions, attention_mask=None, labels=labels), loss_func


def report(step: int, number: int, losses: list[dict[str, Tensor]], groups: Groups) -> None:
    """Prints the loss of the first replica, on its last stage: only there are losses known."""
    if losses and groups.tp.rank() == 0 and groups.dp.rank() == 0:
        loss = torch.stack([each["loss"] for each in losses]).mean().item()
        print(f"{NAMES[number]} model: step {step}, loss {loss}", flush=True)


def checksum(model: Module) -> int:
    """A number that changes with every bit of the weights, of all ranks together."""
    total = torch.zeros(1, dtype=torch.int64, device=platform.device())
    for parameter in model.parameters():
        total += zlib.crc32(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    dist.all_reduce(total)
    return int(total)


if __name__ == "__main__":
    main()
