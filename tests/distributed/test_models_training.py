"""Gradients through Megatron's schedule, DDP and process groups.

The reference for gradients is autograd through the transformers model: Megatron's `main_grad` of
all ranks, sent through the weight export, must be its gradients by name. That covers what a wrong
group would break: tied embeddings, the data-parallel mean, sums over tensor-parallel ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhfuse.pipeline.groups import Layout
from tests.distributed.model_helpers import (
    VOCABULARY,
    Built,
    make_hf_model,
    megatron_args,
    seed_megatron,
)

LAYOUTS = {
    "pp2": Layout.contiguous(4, 1, 2),
    "pp2tp2": Layout.contiguous(4, 2, 2),
    "reversed": Layout((((3,), (2,)), ((1,), (0,)))),
}
KINDS = (("qwen2", "language"), ("qwen3", "language"), ("llama", "scalar"))
TEMPERATURE = 0.7
RELATIVE_TOLERANCE = 1e-4  # float32 sums in another order, relative to the largest gradient

Results = list[dict[str, Any]]


# ---------------------------------------------------------------- on every rank


def check_training(folder: str) -> dict[str, Any]:
    seed_megatron()
    return {
        "gradients": {
            f"{kind} {head} {layout}": _gradients(Path(folder), kind, head, LAYOUTS[layout])
            for kind, head in KINDS
            for layout in LAYOUTS
        },
        "head": _sequence_parallel_head(),
        "pipelines": _pipelines(LAYOUTS["reversed"]),
    }


def _pipelines(layout: Layout) -> dict[str, list[int]]:
    from megatron_rlhfuse.pipeline.groups import build_process_groups

    groups = build_process_groups(layout, "order")
    assert groups is not None
    found = {name: getattr(groups.pgc, name) for name in ("pp", "embd")}
    return {name: dist.get_process_group_ranks(group) for name, group in found.items()}


def _gradients(root: Path, kind: str, head: Any, layout: Layout) -> float:
    """Largest error of any gradient, relative to the largest gradient of its tensor."""
    from megatron.core.distributed import finalize_model_grads

    from megatron_rlhfuse.models.build import wrap_for_training
    from megatron_rlhfuse.models.export import stream_hf_weights

    tokens = torch.randint(0, VOCABULARY, (4, 10), generator=torch.Generator().manual_seed(1))
    expected = _reference_gradients(root / f"{kind}-{head}", kind, head, tokens)
    built = Built(megatron_args(), root / f"{kind}-{head}", head, layout)
    assert built.groups is not None
    model = wrap_for_training(built.model, built.args, built.model.config, built.groups)
    built.model.config.finalize_model_grads_func = finalize_model_grads
    model.zero_grad_buffer()
    pgc = built.groups.pgc

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        return _value_loss(output) if head == "scalar" else _policy_loss(output, batch, pgc.tp)

    share = tokens.chunk(layout.dp)[built.groups.place.data]
    built.run(share.split(1), loss, model)  # micro-batches of one sequence
    for parameter in built.model.parameters():
        parameter.data.copy_(parameter.main_grad)
    worst = 0.0
    for name, found in stream_hf_weights(built.model, built.shape, layout, torch.float32):
        error = (found - expected[name]).abs().max() / expected[name].abs().max()
        worst = max(worst, error.item())
    return worst


def _policy_loss(logits: Tensor, tokens: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    from megatron_rlhfuse.models.logits import token_statistics

    score, entropy = token_statistics(
        logits[:, :-1], tokens[:, 1:], VOCABULARY, TEMPERATURE, tp_group, with_entropy=True
    )
    return (-score - entropy).mean()


def _value_loss(values: Tensor) -> Tensor:
    return ((values - 1.0) ** 2).mean()


def _reference_gradients(folder: Path, kind: str, head: Any, tokens: Tensor) -> dict[str, Tensor]:
    if dist.get_rank() == 0 and not folder.exists():
        model = make_hf_model(kind, head, folder)
        hidden = model.model(tokens).last_hidden_state
        if head == "scalar":
            loss = _value_loss(model.score(hidden))
        else:
            log_p = torch.log_softmax(model.lm_head(hidden)[:, :-1] / TEMPERATURE, dim=-1)
            score = log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1)
            loss = (-score + (log_p.exp() * log_p).sum(-1)).mean()
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.save(gradients, folder / "gradients.pt")
    dist.barrier()
    return torch.load(folder / "gradients.pt")


def _sequence_parallel_head() -> dict[str, float]:
    """The scalar head on four parts of a sequence against a plain linear layer."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_rlhfuse.models.scalar_head import ScalarHead
    from megatron_rlhfuse.pipeline.groups import build_process_groups

    groups = build_process_groups(Layout.blocks(4, 4, 1), "head")
    assert groups is not None
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=4,
        sequence_parallel=True,
        tensor_model_parallel_size=4,
    )
    head = ScalarHead(config, groups)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(12, 3, 8, generator=generator, requires_grad=True)
    head.weight.data.copy_(torch.randn(1, 8, generator=generator))
    weight = head.weight.detach().clone().requires_grad_()
    expected = torch.nn.functional.linear(hidden, weight)
    part = hidden.detach().chunk(4)[groups.place.tensor].clone().requires_grad_()
    found, bias = head(part)
    assert bias is None
    # Every rank computes the same loss of all values, as the last stage does.
    expected.square().sum().backward()
    found.square().sum().backward()
    assert part.grad is not None and head.weight.grad is not None
    assert hidden.grad is not None and weight.grad is not None
    if getattr(head.weight, "sequence_parallel", False):
        dist.all_reduce(head.weight.grad)  # as finalize_model_grads does for such parameters
    return {
        "values": (found - expected).abs().max().item(),
        "hidden": (part.grad - hidden.grad.chunk(4)[groups.place.tensor]).abs().max().item(),
        "weight": (head.weight.grad - weight.grad).abs().max().item(),
    }


# ---------------------------------------------------------------- in the test process


@pytest.fixture(scope="module")
def results(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks(check_training, 4, str(tmp_path_factory.mktemp("training")))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kind", "head"), KINDS)
def test_gradients_equal_those_of_transformers(
    results: Results, kind: str, head: str, layout: str
) -> None:
    for result in results:
        assert result["gradients"][f"{kind} {head} {layout}"] < RELATIVE_TOLERANCE


def test_groups_of_a_reversed_pipeline_keep_its_order(results: Results) -> None:
    for rank, result in enumerate(results):
        pipeline = [3, 2] if rank > 1 else [1, 0]
        # Megatron takes the first of `embd` for the owner of tied embeddings.
        assert result["pipelines"] == {"pp": pipeline, "embd": pipeline}


def test_scalar_head_works_on_parts_of_a_sequence(results: Results) -> None:
    for result in results:
        assert max(result["head"].values()) < 1e-4, result["head"]  # values of order 10
