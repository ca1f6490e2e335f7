"""A generation instance on real vLLM engines: what it makes, and what its weights are."""

from __future__ import annotations

import time

import pytest
import torch

from megatron_rlhfuse.rollout.engine import GenerationEngine
from megatron_rlhfuse.rollout.samples import Sample

from .conftest import EOS, SAMPLING, TinyModel, requests

STOPS = {*SAMPLING.stop_token_ids, EOS}


def tokens(samples: list[Sample]) -> list[tuple[int, ...]]:
    return [sample.response for sample in samples]


def largest_difference(left: list[Sample], right: list[Sample]) -> float:
    return max(
        abs(a - b)
        for one, other in zip(left, right, strict=True)
        for a, b in zip(one.log_probs, other.log_probs, strict=True)
    )


def reference_difference(model: TinyModel, version: int, samples: list[Sample]) -> float:
    weights = model.weights(version)
    return max(
        float(
            (model.log_probs(weights, s.prompt, s.response) - torch.tensor(s.log_probs)).abs().max()
        )
        for s in samples
    )


def test_responses_end_as_the_options_say(engine: GenerationEngine, tiny_model: TinyModel) -> None:
    engine.update_weights(tiny_model.weights(1).items(), 1)
    before = time.time()
    samples = engine.generate(requests(16))
    assert [sample.sample_id for sample in samples] == list(range(16))
    assert {sample.stop_reason for sample in samples} == {"stop", "length"}
    for sample, request in zip(samples, requests(16), strict=True):
        assert sample.prompt == request.prompt
        assert (sample.weight_version, sample.instance) == (1, 0)
        assert before <= sample.started <= sample.finished <= time.time()
        assert SAMPLING.min_new_tokens <= len(sample.response) <= SAMPLING.max_new_tokens
        stopped = sample.response[-1] in STOPS
        assert sample.stop_reason == ("stop" if stopped else "length")
        assert stopped or len(sample.response) == SAMPLING.max_new_tokens
        assert not STOPS.intersection(sample.response[:-1])


def test_tokens_depend_on_weights_prompt_and_seed_only(
    engine: GenerationEngine, fresh_engine: GenerationEngine, tiny_model: TinyModel
) -> None:
    engine.update_weights(tiny_model.weights(2).items(), 2)
    together = engine.generate(requests(16))
    alone = [engine.generate([request])[0] for request in requests(16)]
    elsewhere = fresh_engine.generate(requests(16)[::-1])
    for others in (alone, elsewhere):
        assert tokens(others) == tokens(together)
        assert largest_difference(others, together) < 1e-5
    assert len(set(tokens(together))) == 16


def test_updated_engine_equals_a_fresh_one_and_hugging_face(
    engine: GenerationEngine, fresh_engine: GenerationEngine, tiny_model: TinyModel
) -> None:
    engine.update_weights(tiny_model.weights(1).items(), 1)
    old = engine.generate(requests(8))
    # The same prompts again: what the prefix cache holds of them belongs to version 1.
    update = engine.update_weights(tiny_model.weights(2).items(), 2)
    new = engine.generate(requests(8))
    fresh = fresh_engine.generate(requests(8))

    assert update.bytes == sum(tensor.nbytes for tensor in tiny_model.weights(2).values())
    assert tokens(new) == tokens(fresh) != tokens(old)
    assert largest_difference(new, fresh) < 1e-5
    assert {sample.weight_version for sample in new} == {2}
    assert reference_difference(tiny_model, 1, old) < 1e-4
    assert reference_difference(tiny_model, 2, new) < 1e-4
    # The bound means something: other weights are far away.
    assert reference_difference(tiny_model, 1, new) > 1e-2


def test_an_update_that_does_not_fit_is_refused_and_changes_nothing(
    engine: GenerationEngine, tiny_model: TinyModel
) -> None:
    engine.update_weights(tiny_model.weights(1).items(), 1)
    before = engine.generate(requests(2))
    missing = "model.layers.1.self_attn.k_proj.weight"
    partial = tiny_model.weights(2)
    extra = partial | {"model.layers.2.mlp.up_proj.weight": partial.pop(missing)}
    with pytest.raises(ValueError, match=f"missing {missing}"):
        engine.update_weights(partial.items(), 2)
    with pytest.raises(ValueError, match=r"unexpected model\.layers\.2\.mlp\.up_proj\.weight"):
        engine.update_weights(extra.items(), 2)
    after = engine.generate(requests(2))
    assert tokens(after) == tokens(before)
    assert {sample.weight_version for sample in after} == {1}


def test_samples_come_as_they_finish_and_observations_meanwhile(
    engine: GenerationEngine, tiny_model: TinyModel
) -> None:
    engine.update_weights(tiny_model.weights(1).items(), 1)
    batch = requests(16) * 20
    engine.submit(batch)
    assert engine.unfinished == len(batch)
    first = engine.poll(60.0)
    assert 0 < len(first) < len(batch)
    with pytest.raises(RuntimeError, match="unfinished"):
        engine.update_weights(tiny_model.weights(2).items(), 2)
    samples = list(first)
    while engine.unfinished:
        samples += engine.poll(1.0)
        seen = engine.observations
    assert len(samples) == len(batch)
    assert seen is not None
    assert seen.running == engine.options.max_num_seqs or seen.waiting == 0
    assert seen.running + seen.waiting == len(seen.unfinished)
    assert all(0 <= length <= SAMPLING.max_new_tokens for _, length in seen.unfinished)
    assert 0.0 < seen.kv_usage < 1.0
    assert 0.0 < seen.step_seconds < 10.0
    assert 0.0 < seen.step_sequences <= engine.options.max_num_seqs


def test_aborted_samples_do_not_come_out(engine: GenerationEngine, tiny_model: TinyModel) -> None:
    engine.update_weights(tiny_model.weights(1).items(), 1)
    whole = engine.generate(requests(8))
    engine.submit(requests(8))
    engine.abort(range(4))
    samples = []
    while engine.unfinished:
        samples += engine.poll(1.0)
    assert sorted(sample.sample_id for sample in samples) == [4, 5, 6, 7]
    assert tokens(engine.generate(requests(8))) == tokens(whole)


def test_requests_that_cannot_be_made_are_refused(
    engine: GenerationEngine, tiny_model: TinyModel
) -> None:
    engine.update_weights(tiny_model.weights(1).items(), 1)
    with pytest.raises(ValueError, match="sample 0: a prompt of 209 tokens"):
        engine.submit(requests(1, prompt_tokens=209))
    assert engine.unfinished == 0
    assert len(engine.generate(requests(1, prompt_tokens=208))) == 1
