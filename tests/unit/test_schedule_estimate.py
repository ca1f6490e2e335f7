"""Estimates against the totals and formulas of the papers they come from."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlhfuse.schedule.estimate import (
    Training,
    estimate_stages,
    layer_activation_bytes,
    layer_flops,
    p2p_milliseconds,
    parameter_bytes,
    parameters,
    split_layers,
    stage_parameters,
)
from megatron_rlhfuse.schedule.layout import Parallelism
from megatron_rlhfuse.schedule.presets import GPUS, SHAPES, TransformerShape

GPT3 = TransformerShape(96, 12_288, 4 * 12_288, 96, 96, 128, 51_200, gated=False)
MT_NLG = TransformerShape(105, 20_480, 4 * 20_480, 128, 128, 160, 51_200, gated=False)
KORTHIKANTI = Training(2048, sequence_parallel=False, flash_attention=False, dropout=True)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-7b", 6.74), ("llama-13b", 13.02), ("llama-33b", 32.53), ("llama-65b", 65.29)],
)
def test_parameters_of_llama(name: str, billions: float) -> None:
    assert parameters(SHAPES[name]) / 1e9 == pytest.approx(billions, abs=0.005)


def test_parameters_of_gpt3() -> None:
    # 12 l h^2 (1 + v / (12 l h)), Narayanan et al. 2021, without biases and positions
    assert parameters(replace(GPT3, tied=True)) == pytest.approx(174.6e9, rel=0.001)


def test_grouped_queries_as_in_llama3() -> None:
    llama3 = TransformerShape(32, 4096, 14_336, 32, 8, 128, 128_256)
    assert parameters(llama3) == 8_030_261_248  # the released Llama 3 8B


def test_a_value_head_has_one_row() -> None:
    language = SHAPES["llama-7b"]
    critic = replace(language, scalar_head=True)
    assert parameters(language) - parameters(critic) == (language.vocab - 1) * language.hidden


def test_a_tied_head_is_a_copy_on_another_stage() -> None:
    tied = replace(SHAPES["llama-7b"], tied=True)
    table = tied.vocab * tied.hidden
    assert sum(stage_parameters(tied, [16, 16])) == parameters(tied) + table


@given(st.integers(1, 64), st.integers(0, 200))
def test_layers_are_split_evenly(stages: int, more: int) -> None:
    layers = split_layers(stages + more, stages)
    assert sum(layers) == stages + more
    assert len(layers) == stages
    assert max(layers) - min(layers) <= 1
    assert layers[-1] == min(layers)  # the head is there
    if more % stages <= stages - 2:
        assert layers[0] == min(layers)


def test_flops_of_a_gpt_layer() -> None:
    h, s = GPT3.hidden, 2048
    assert layer_flops(GPT3, s) == 24 * h**2 + 4 * s * h


def test_operations_of_an_iteration() -> None:
    # Narayanan et al. 2021, equation 3: 96 B s l h^2 (1 + s / 6h + V / 16lh), with recomputation
    training = replace(KORTHIKANTI, recomputation="full", mfu=0.5)
    gpu = replace(GPUS["A100"], hbm_gb_per_s=1e12)
    costs = estimate_stages(GPT3, Parallelism(1, 1, 1), training, gpu)
    layers, h, s, v = GPT3.layers, GPT3.hidden, 2048, GPT3.vocab
    operations = 96 * s * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    seconds = (costs.forward[0] + costs.backward[0]) / 1e3
    assert seconds * 0.5 * 312e12 == pytest.approx(operations, rel=1e-5)


@pytest.mark.parametrize(("shape", "ratio"), [(GPT3, 80), (MT_NLG, 64)])
def test_activations_of_korthikanti(shape: TransformerShape, ratio: int) -> None:
    # The paper, section 5: 5 a s / h is 80 for GPT-3 and 64 for MT-NLG.
    sbh, tp = 2048 * shape.hidden, 8
    parallel = replace(KORTHIKANTI, sequence_parallel=True)
    selective = replace(parallel, recomputation="selective")
    full = replace(KORTHIKANTI, recomputation="full")
    assert layer_activation_bytes(shape, KORTHIKANTI, 1) == sbh * (34 + ratio)
    assert layer_activation_bytes(shape, KORTHIKANTI, tp) == sbh * (10 + (24 + ratio) / tp)
    assert layer_activation_bytes(shape, parallel, tp) == sbh * (34 + ratio) / tp
    assert layer_activation_bytes(shape, selective, tp) == sbh * 34 / tp
    assert layer_activation_bytes(shape, full, tp) == sbh * 2


def test_selective_recomputation_saves_what_the_paper_says() -> None:
    selective = replace(KORTHIKANTI, recomputation="selective")
    for shape, saved in ((GPT3, 0.70), (MT_NLG, 0.65)):
        share = layer_activation_bytes(shape, selective, 1) / layer_activation_bytes(
            shape, KORTHIKANTI, 1
        )
        assert 1 - share == pytest.approx(saved, abs=0.005)


def test_flash_attention_removes_the_quadratic_term() -> None:
    def held(length: int, flash: bool) -> float:
        training = Training(length, flash_attention=flash)
        return layer_activation_bytes(SHAPES["llama-13b"], training, 4)

    assert held(4096, True) == 2 * held(2048, True)
    assert held(4096, False) > 2 * held(2048, False)


def test_backward_takes_twice_the_forward_and_full_recomputation_three_times() -> None:
    shape, sizes = SHAPES["llama-7b"], Parallelism(1, 4, 1)
    kept = estimate_stages(shape, sizes, Training(1024), GPUS["H100"])
    again = estimate_stages(shape, sizes, Training(1024, recomputation="full"), GPUS["H100"])
    for stage in (1, 2):
        assert kept.backward[stage] == pytest.approx(2 * kept.forward[stage], rel=1e-5)
        assert again.backward[stage] == pytest.approx(3 * kept.forward[stage], rel=1e-5)
    assert again.activation[1] == pytest.approx(8 * 2 * 1024 * 4096 / 1e9)


def test_embedding_and_head_lengthen_their_stages() -> None:
    shape, sizes = SHAPES["llama-7b"], Parallelism(2, 4, 1)
    actor = estimate_stages(shape, sizes, Training(2048), GPUS["H800"])
    critic = estimate_stages(replace(shape, scalar_head=True), sizes, Training(2048), GPUS["H800"])
    assert actor.forward[1] == actor.forward[2] < min(actor.forward[0], actor.forward[3])
    assert actor.resident[1] == actor.resident[2] < min(actor.resident[0], actor.resident[3])
    # 2 h v operations per token on two GPUs
    head_ms = 1e3 * 2048 * 2 * 4096 * 32_000 / (2 * 989.4e12 * 0.45)
    assert actor.forward[3] - actor.forward[2] == pytest.approx(head_ms, abs=1e-3)
    assert critic.forward[3] == pytest.approx(critic.forward[2], rel=1e-3)
    assert critic.activation[3] < actor.activation[3]


def test_all_reduces_take_their_ring_time() -> None:
    # Two per layer and pass, each 2 (t - 1) / t of s b h bf16 numbers over a link.
    shape, sizes = SHAPES["llama-7b"], Parallelism(4, 4, 1)
    free = replace(GPUS["H800"], nvlink_gb_per_s=1e12)
    costs = [estimate_stages(shape, sizes, Training(2048), gpu) for gpu in (GPUS["H800"], free)]
    expected = 1e3 * 8 * 2 * 2 * 3 / 4 * (2048 * 4096 * 2) / (200e9 * 0.8)
    assert costs[0].forward[1] - costs[1].forward[1] == pytest.approx(expected, abs=1e-3)
    assert costs[0].backward[1] - costs[1].backward[1] == pytest.approx(expected, abs=1e-3)


def test_a_hop_takes_its_bytes_over_the_link() -> None:
    shape, gpu = SHAPES["llama-65b"], GPUS["A100"]
    size = 1024 * 2 * 8192 * 2
    training = Training(1024, micro_batch_size=2, link_efficiency=0.5)
    whole = replace(training, sequence_parallel=False)
    assert p2p_milliseconds(shape, 8, whole, gpu, True) == pytest.approx(
        1e3 * size / 12.5e9, rel=1e-5
    )
    assert p2p_milliseconds(shape, 8, training, gpu, True) == pytest.approx(
        1e3 * size / 8 / 12.5e9, rel=1e-5
    )
    assert p2p_milliseconds(shape, 8, whole, gpu, False) == pytest.approx(
        1e3 * size / 150e9, rel=1e-5
    )


def test_bytes_per_parameter_of_megatrons_optimizers() -> None:
    assert parameter_bytes(1, distributed_optimizer=True) == 18
    assert parameter_bytes(8, distributed_optimizer=False) == 18
    assert parameter_bytes(8, distributed_optimizer=True) == 7.5


def test_resident_memory_is_that_of_all_parameters() -> None:
    shape, sizes = SHAPES["llama-13b"], Parallelism(4, 4, 2)
    costs = estimate_stages(shape, sizes, Training(2048), GPUS["H100"])
    assert math.fsum(costs.resident) * 4 == pytest.approx(18 * 13.02, rel=1e-3)
