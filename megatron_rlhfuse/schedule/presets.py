"""GPUs and models that a cluster description can name, and the fields of those it spells out.

Bandwidths are those of one GPU in one direction: NVIDIA's data sheets give the NVLink of both
directions together, so half of it stands here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One GPU and its links.

    Attributes:
        peak_tflops: dense bf16, 1e12 operations per second
        memory_gb: 1e9 bytes, as on the data sheet; drivers report more, which is left to the CUDA
            context and the buffers of NCCL
        hbm_gb_per_s: bandwidth of its memory, 1e9 bytes per second
        nvlink_gb_per_s: to the other GPUs of the node, one direction
        network_gb_per_s: to other nodes, one direction, its share of the node's adapters
    """

    name: str
    peak_tflops: float
    memory_gb: float
    hbm_gb_per_s: float
    nvlink_gb_per_s: float
    network_gb_per_s: float


GPUS = {
    # "NVIDIA H100 Tensor Core GPU" data sheet, SXM; network: "NVIDIA DGX H100" data sheet, eight
    # ConnectX-7 of 400 Gb/s for eight GPUs.
    "H100": Gpu("H100", 989.4, 80.0, 3350.0, 450.0, 50.0),
    # An H100 whose NVLink is cut to 400 GB/s; DeepSeek-V3 technical report, section 3.1: eight
    # adapters of 400 Gb/s for eight GPUs.
    "H800": Gpu("H800", 989.4, 80.0, 3350.0, 200.0, 50.0),
    # "NVIDIA A100 Tensor Core GPU" data sheet, 80 GB SXM; network: "NVIDIA DGX A100" data sheet,
    # eight adapters of 200 Gb/s for eight GPUs.
    "A100": Gpu("A100", 312.0, 80.0, 2039.0, 300.0, 25.0),
}


@dataclass(frozen=True)
class TransformerShape:
    """A dense decoder. Sizes are those of the whole model.

    Attributes:
        gated: the feed-forward part has a gate (SwiGLU): three matrices instead of two
        scalar_head: it ends in one value per token (a critic), not in the vocabulary
        tied: the output head shares the matrix of the embedding
    """

    layers: int
    hidden: int
    ffn_hidden: int
    heads: int
    query_groups: int
    head_dim: int
    vocab: int
    gated: bool = True
    scalar_head: bool = False
    tied: bool = False


def _llama(layers: int, hidden: int, ffn_hidden: int, heads: int) -> TransformerShape:
    return TransformerShape(layers, hidden, ffn_hidden, heads, heads, hidden // heads, 32_000)


# "LLaMA: Open and Efficient Foundation Language Models" (2023), table 2; the feed-forward sizes
# are those of the released checkpoints. The paper rounds what is called 33B here to 32.5B.
SHAPES = {
    "llama-7b": _llama(32, 4096, 11_008, 32),
    "llama-13b": _llama(40, 5120, 13_824, 40),
    "llama-33b": _llama(60, 6656, 17_920, 52),
    "llama-65b": _llama(80, 8192, 22_016, 64),
}
