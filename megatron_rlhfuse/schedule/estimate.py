"""Stage times and memory of a model from its shape, where nothing has been measured yet.

Sources, cited at each formula:
- [N] Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using
  Megatron-LM" (2021): operations per layer, all-reduces of tensor parallelism;
- [K] Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022):
  bytes of activations per layer, selective recomputation, sequence parallelism;
- Megatron Core's guide on the distributed optimizer: bytes per parameter.

The letters of both: s tokens per sample, b samples per micro-batch, h hidden size, a heads,
v vocabulary, t tensor-parallel size. Here also f, the feed-forward size, q = a x head size, the
width of the queries, and k = query groups x head size, that of the keys and of the values.
Everything is per GPU; times in milliseconds, memory in GB (1e9 bytes). Biases, and whatever runs
once per mini-batch (gradient reduction, optimizer step), are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from megatron_rlhfuse.schedule.layout import Parallelism, StageCosts
from megatron_rlhfuse.schedule.presets import Gpu, TransformerShape

Recomputation = Literal["none", "selective", "full"]
RECOMPUTATIONS: tuple[Recomputation, ...] = get_args(Recomputation)

DEFAULT_MFU = 0.45
"""Share of the peak that a stage's arithmetic reaches. [N] measures 0.44 to 0.52 on A100s with
bubbles and transfers in it, Megatron Core up to 0.47 on H100s; micro-batches are small here."""

DEFAULT_LINK_EFFICIENCY = 0.8
"""Share of a link's bandwidth that transfers reach: the DeepSeek-V3 technical report counts on
160 of the 200 GB/s of an H800's NVLink."""

_BF16, _FP32 = 2, 4
_ALL_REDUCES = 2  # per layer and pass, [N] section 2.3: one after attention, one after the MLP


@dataclass(frozen=True)
class Training:
    """How a model is trained, and how well the machine is used.

    Attributes:
        sequence_length: tokens per sample, prompt and response
        micro_batch_size: samples per micro-batch
        recomputation: Megatron's recompute granularity: nothing, the core of the attention, or
            whole layers
        sequence_parallel: splits norms and residuals over the tensor-parallel ranks too
        flash_attention: no s x s matrix is ever stored
        distributed_optimizer: optimizer state is split over the data-parallel ranks
        dropout: masks are stored; training here has none, the formulas of [K] have
    """

    sequence_length: int
    micro_batch_size: int = 1
    recomputation: Recomputation = "none"
    sequence_parallel: bool = True
    flash_attention: bool = True
    distributed_optimizer: bool = False
    mfu: float = DEFAULT_MFU
    link_efficiency: float = DEFAULT_LINK_EFFICIENCY
    dropout: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch, s x b."""
        return self.sequence_length * self.micro_batch_size


def layer_parameters(shape: TransformerShape) -> int:
    """Parameters of one layer: attention, feed-forward part, two norms."""
    h, q, k = shape.hidden, *_widths(shape)
    return 2 * h * (q + k) + (3 if shape.gated else 2) * h * shape.ffn_hidden + 2 * h


def parameters(shape: TransformerShape) -> int:
    """Parameters of the whole model."""
    return sum(stage_parameters(shape, [shape.layers]))


def stage_parameters(shape: TransformerShape, layers: list[int]) -> list[int]:
    """Parameters of every stage, given its layers; the embedding comes first, the head last.

    A tied head is a second copy of the embedding where it is on another stage.
    """
    stages = [count * layer_parameters(shape) for count in layers]
    table = shape.vocab * shape.hidden
    stages[0] += table
    stages[-1] += shape.hidden  # the last norm
    if shape.scalar_head:
        stages[-1] += shape.hidden
    elif not shape.tied or len(layers) > 1:
        stages[-1] += table
    return stages


def split_layers(layers: int, stages: int) -> list[int]:
    """Layers of every stage: as equal as can be, the spare ones in the middle.

    The first and the last stage also have the embedding and the head.
    """
    spare = layers % stages
    first = (stages - spare) // 2
    return [layers // stages + (first <= stage < first + spare) for stage in range(stages)]


def layer_flops(shape: TransformerShape, sequence_length: int) -> float:
    """Floating-point operations of one layer's forward pass per token.

    [N], section 3 and appendix: two per weight of a matrix and 4 s q for the two products of the
    attention, with causal attention counted in full as there; 24 h^2 + 4 s h for a GPT.
    """
    weights = layer_parameters(shape) - 2 * shape.hidden
    return 2 * weights + core_attention_flops(shape, sequence_length)


def core_attention_flops(shape: TransformerShape, sequence_length: int) -> float:
    """Operations per token of queries x keys and of scores x values."""
    return 4 * sequence_length * _widths(shape)[0]


def layer_activation_bytes(shape: TransformerShape, training: Training, tp: int) -> float:
    """Bytes of activations that one layer keeps of a micro-batch on each GPU.

    [K], equations 1, 2 and 4 and table 2, term by term; a GPT with dropout and without flash
    attention gives s b h (34 + 5 a s / h). What is split by tensor parallelism: queries, keys,
    values, input of the projection, the inside of the feed-forward part. What only sequence
    parallelism splits: the inputs of both norms, of the attention and of the MLP, and the masks
    of dropout (1 byte each). Full recomputation keeps the layer's input alone.
    """
    h, q, k = shape.hidden, *_widths(shape)
    shared = tp if training.sequence_parallel else 1
    if training.recomputation == "full":
        return training.tokens * _BF16 * h / shared
    whole = _BF16 * 4 * h + (2 * h if training.dropout else 0)
    inside = _BF16 * (2 * q + 2 * k + (3 if shape.gated else 2) * shape.ffn_hidden)
    scores: float = 0
    if training.recomputation == "none" and not training.flash_attention:
        # The output of the softmax; with dropout also its output and its mask.
        scores = (5 if training.dropout else 2) * shape.heads * training.sequence_length
    return training.tokens * (whole / shared + (inside + scores) / tp)


def estimate_stages(
    shape: TransformerShape, sizes: Parallelism, training: Training, gpu: Gpu
) -> StageCosts:
    """Times in ms and memory in GB of every stage of a model. Layout errors are the caller's."""
    layers = split_layers(shape.layers, sizes.pp)
    counts = stage_parameters(shape, layers)
    forward, backward, activation, resident = [], [], [], []
    for stage, count in enumerate(layers):
        ends = (stage == 0, stage == sizes.pp - 1)
        f, b = _stage_seconds(shape, training, gpu, sizes.tp, count, *ends)
        forward.append(_round(1e3 * f))
        backward.append(_round(1e3 * b))
        held = count * layer_activation_bytes(shape, training, sizes.tp)
        held += _head_activation_bytes(shape, training, sizes.tp) if ends[1] else 0.0
        activation.append(_round(held / 1e9))
        kept = counts[stage] / sizes.tp * parameter_bytes(sizes.dp, training.distributed_optimizer)
        kept += _recomputed_bytes(shape, training, sizes.tp)
        resident.append(_round(kept / 1e9))
    return StageCosts(tuple(forward), tuple(backward), tuple(activation), tuple(resident))


def parameter_bytes(dp: int, distributed_optimizer: bool) -> float:
    """Bytes of weight, gradient and Adam state per parameter: bf16 weights, fp32 gradients.

    Megatron Core, distributed optimizer: 18, or 6 + 12 / dp.
    """
    return 6 + 12 / dp if distributed_optimizer else 18


def p2p_milliseconds(
    shape: TransformerShape, tp: int, training: Training, gpu: Gpu, between_nodes: bool
) -> float:
    """Time of one hop: the bf16 activations [s, b, h] over one GPU's link.

    With sequence parallelism every rank sends its share, else each sends all of it ([N],
    section 4.1).
    """
    shares = tp if training.sequence_parallel else 1
    size = training.tokens * shape.hidden * _BF16 / shares
    link = gpu.network_gb_per_s if between_nodes else gpu.nvlink_gb_per_s
    return _round(1e3 * size / (1e9 * link * training.link_efficiency))


def _stage_seconds(
    shape: TransformerShape,
    training: Training,
    gpu: Gpu,
    tp: int,
    layers: int,
    first: bool,
    last: bool,
) -> tuple[float, float]:
    """Forward and backward of one micro-batch.

    The backward has twice the operations of the forward ([N]; Kaplan et al. 2020, section 2.1)
    and as many all-reduces; recomputation repeats parts of the forward in it. Flash attention
    recomputes the core of the attention by itself, so selective recomputation adds nothing then.
    """
    rate = gpu.peak_tflops * 1e12 * training.mfu * tp / training.tokens  # operations per token
    compute = layers * layer_flops(shape, training.sequence_length) / rate
    transfer = layers * _ALL_REDUCES * _all_reduce_seconds(shape, training, gpu, tp)
    again = 0.0
    if training.recomputation == "full":
        again = compute + transfer
    elif training.recomputation == "selective" and not training.flash_attention:
        again = layers * core_attention_flops(shape, training.sequence_length) / rate
    if last:
        width = 1 if shape.scalar_head else shape.vocab
        compute += 2 * shape.hidden * width / rate  # [N], the logit layer
    if first:
        # The lookup has no arithmetic to speak of: it reads and writes [s, b, h], then sums it.
        moved = 2 * training.tokens * shape.hidden * _BF16
        transfer += moved / (gpu.hbm_gb_per_s * 1e9)
        transfer += _all_reduce_seconds(shape, training, gpu, tp)
    return compute + transfer, 2 * compute + transfer + again


def _all_reduce_seconds(shape: TransformerShape, training: Training, gpu: Gpu, tp: int) -> float:
    """A ring all-reduce of [s, b, h] over NVLink: 2 (t - 1) / t of it through every GPU's link.

    With sequence parallelism it is a reduce-scatter and an all-gather of the same volume ([K],
    section 4.2.2).
    """
    size = training.tokens * shape.hidden * _BF16
    return 2 * (tp - 1) / tp * size / (gpu.nvlink_gb_per_s * 1e9 * training.link_efficiency)


def _head_activation_bytes(shape: TransformerShape, training: Training, tp: int) -> float:
    """What the last stage keeps besides its layers: 4 s b h (1 + v / h), [K] section 4.3.

    The inputs of the last norm and of the head, and the logits in fp32.
    """
    shared = tp if training.sequence_parallel else 1
    logits = _FP32 * (1.0 if shape.scalar_head else shape.vocab / tp)
    return training.tokens * (_BF16 * 2 * shape.hidden / shared + logits)


def _recomputed_bytes(shape: TransformerShape, training: Training, tp: int) -> float:
    """Room for the layer that full recomputation brings back in a backward pass."""
    if training.recomputation != "full":
        return 0.0
    return layer_activation_bytes(shape, replace(training, recomputation="none"), tp)


def _widths(shape: TransformerShape) -> tuple[int, int]:
    """Widths of the queries and of the keys (the values are as wide)."""
    return shape.heads * shape.head_dim, shape.query_groups * shape.head_dim


def _round(value: float) -> float:
    """Six digits: more would be noise, and would make plan files long."""
    return float(f"{value:.6g}")
