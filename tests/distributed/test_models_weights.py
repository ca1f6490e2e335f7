"""Hugging Face folders -> Megatron models in many layouts -> Hugging Face tensors again.

One launch of four ranks runs all of weight_checks.py; each test reads its part of the results.
Megatron's own `parallel_state` is set up as TP 2 x PP 2 all the while, so that a model in another
layout that asked it instead of its own groups would show.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.model_helpers import KINDS
from tests.distributed.weight_checks import LAYOUTS, check_weights

RANKS = 4
TOLERANCE = 1e-4  # float32, logits of order 10

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_ranks(check_weights, RANKS, str(tmp_path_factory.mktemp("models")))


def _last_stage(layout: str) -> set[int]:
    return {rank for replica in LAYOUTS[layout].ranks for rank in replica[-1]}


def test_contiguous_layout_has_the_groups_of_megatrons_parallel_state(results: Results) -> None:
    assert all(result["mpu"] for result in results)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_transformers(results: Results, kind: str, layout: str) -> None:
    for rank, result in enumerate(results):
        difference = result["language"][kind][layout]["difference"]
        assert (difference is not None) == (rank in _last_stage(layout))
        assert difference is None or difference < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_values_equal_those_of_a_sequence_classifier(
    results: Results, kind: str, layout: str
) -> None:
    for rank in _last_stage(layout):
        found = results[rank]["scalar"][kind][layout]
        assert found["difference"] < TOLERANCE
        assert found["start"] == 0.0  # a critic from a language model


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_gives_every_rank_exactly_what_was_loaded(results: Results, layout: str) -> None:
    for result in results:
        for head in ("language", "scalar"):
            for kind, found in result[head].items():
                assert found[layout]["wrong"] == [], (head, kind)


def test_stream_fills_a_model_in_another_layout_exactly(results: Results) -> None:
    for result in results:
        assert len(result["stream"]) == 3
        assert all(result["stream"].values()), result["stream"]


def test_distributed_checkpoint_of_a_critic_loads_in_another_layout(results: Results) -> None:
    assert all(result["checkpoint"] for result in results)


def test_saved_folders_load_in_transformers(results: Results) -> None:
    saved = results[0]["saved"]
    assert saved["equal"]
    assert saved["files"] == [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert saved["values"] == [[0.0]]
    assert saved["left"] == []


def test_a_rank_reads_only_the_slices_that_it_keeps(results: Results) -> None:
    padding = 64 * 4  # one row of the embedding or the output layer, on the second tensor rank
    for rank, result in enumerate(results):
        reads = result["reads"]
        assert reads["read"] == reads["holds"] - padding * (rank % 2)


def test_bfloat16_parameters_are_rounded_once(results: Results) -> None:
    for rank, result in enumerate(results):
        assert result["bfloat16"]["dtypes"] == ["torch.bfloat16"]
        assert result["bfloat16"]["wrong"] == []
        expected = "torch.bfloat16" if rank in _last_stage("pp2tp2") else None
        assert result["bfloat16"]["output"] == expected
