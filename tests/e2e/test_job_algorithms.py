"""Whole jobs with other algorithms, layouts, precisions and sources of reward."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from megatron_rlhfuse.observe.metrics import METRICS
from tests.e2e.jobs import TOY, Job

BATCH = 16
MAX_NEW_TOKENS = 48

CRITIC_FIELDS = {name for name, metric in METRICS.items() if metric.group == "value"} | {
    "critic_grad_norm",
    "critic_lr",
}

# A tenth of a point per ten characters, and a record of what the function was called with.
REWARD_MODULE = """
import json
from pathlib import Path

def score(prompt, response, fields):
    call = {"prompt": prompt, "response": response, "fields": fields}
    with Path(__file__).with_name("calls.jsonl").open("a") as file:
        file.write(json.dumps(call) + "\\n")
    return len(response) / 100
"""


def run_with_function(folder: Path, **flags: object) -> Job:
    """Runs a job to its end whose reward comes, maybe besides a model's, from REWARD_MODULE."""
    code = folder / "code"
    code.mkdir()
    (code / "length_reward.py").write_text(REWARD_MODULE)
    return run_to_end(
        folder,
        environment={"PYTHONPATH": str(code)},
        reward_function="length_reward:score",
        **flags,
    )


def run_to_end(folder: Path, **arguments: Any) -> Job:
    job = Job(folder, rollout_batch_size=BATCH, rollout_max_new_tokens=MAX_NEW_TOKENS, **arguments)
    assert job.wait() == 0, job.output
    job.assert_nothing_left()
    return job


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def finite_metrics(folder: Path, iterations: int) -> list[dict[str, float]]:
    """The records of a run of so many iterations, all of whose numbers are finite."""
    records = read_lines(folder / "metrics.jsonl")
    assert [record["iteration"] for record in records] == list(range(1, iterations + 1))
    for record in records:
        numbers = {name: value for name, value in record.items() if name != "fusion"}
        bad = [name for name, value in numbers.items() if value is None or not math.isfinite(value)]
        assert not bad, f"iteration {record['iteration']}: {bad}"
        assert {"policy_loss", "entropy", "actor_grad_norm"} <= record.keys()
        assert record["actor_grad_norm"] > 0
    return records


def calls_by_iteration(folder: Path, iterations: int) -> list[list[dict[str, Any]]]:
    """What the reward function was called with; an iteration's calls end before the next one's."""
    calls = read_lines(folder / "code" / "calls.jsonl")
    assert len(calls) == iterations * BATCH
    return [calls[start : start + BATCH] for start in range(0, len(calls), BATCH)]


def assert_seen_as_in_the_data(calls: list[dict[str, Any]]) -> None:
    """Prompt and fields are those of one line of the data; the response is text of the actor."""
    tokenizer = AutoTokenizer.from_pretrained(TOY / "actor")
    lines = []
    for fields in read_lines(TOY / "prompts.jsonl"):
        prompt = fields.pop("prompt", None) or tokenizer.apply_chat_template(
            fields.pop("messages"), tokenize=False, add_generation_prompt=True
        )
        lines.append((prompt, fields))
    for call in calls:
        assert (call["prompt"], call["fields"]) in lines
        assert "<eos>" not in call["response"] and call["prompt"] not in call["response"]


def length_score(calls: list[dict[str, Any]]) -> float:
    """What REWARD_MODULE must have given these calls on average."""
    return statistics.fmean(len(call["response"]) / 100 for call in calls)


def spans(folder: Path, name: str) -> Counter[int]:
    """How many spans of this name each rank has in the trace."""
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return Counter(event["pid"] for event in events if event.get("name") == name)


def test_grpo_with_a_reward_function_alone(tmp_path: Path) -> None:
    run_with_function(
        tmp_path,
        advantage_estimator="grpo",
        rollout_samples_per_prompt=4,
        reward_model=None,
        ppo_kl_placement="loss",
        ppo_tis_cap=2,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=1,
    )
    records = finite_metrics(tmp_path, 2)
    for record, calls in zip(records, calls_by_iteration(tmp_path, 2), strict=True):
        assert_seen_as_in_the_data(calls)
        assert all(count % 4 == 0 for count in Counter(c["prompt"] for c in calls).values())
        assert len({call["response"] for call in calls}) > BATCH // 2  # four draws, not copies
        assert record["score_mean"] == pytest.approx(length_score(calls), abs=1e-5)
        assert record["reward_mean"] == pytest.approx(record["score_mean"], abs=1e-6)
        assert not CRITIC_FIELDS & record.keys()
        # Two tensor-parallel ranks and two whole engines compute the same policy.
        assert record["logprob_difference_max"] < 1e-4
        assert record["tis_truncated_fraction"] == 0
    assert records[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert abs(records[1]["kl"]) > 1e-4
    assert not spans(tmp_path, "critic step")


def test_reinforce_on_two_replicas_with_one_engine_and_no_reference(tmp_path: Path) -> None:
    run_to_end(
        tmp_path,
        advantage_estimator="reinforce++",
        pipeline_model_parallel_size=1,
        ppo_kl_coef=0,
        rollout_instances=1,
    )
    for record in finite_metrics(tmp_path, 2):
        assert not (CRITIC_FIELDS | {"kl", "kl_sequence"}) & record.keys()
        assert record["advantages_mean"] == pytest.approx(0, abs=1e-5)
        assert record["advantages_std"] == pytest.approx(1, abs=1e-2)
        # Each replica scores samples with its own weights, so in the second iteration replicas
        # that drifted apart would differ from the one engine.
        assert record["logprob_difference_max"] < 1e-4
    assert list(spans(tmp_path, "actor step").values()) == [4, 4]
    assert len(spans(tmp_path, "score")) == 2
    assert (tmp_path / "logs" / "engine0.log").exists()
    assert not (tmp_path / "logs" / "engine1.log").exists()


def test_gae_in_bf16_with_two_rewards_early_stop_and_recomputation(tmp_path: Path) -> None:
    run_with_function(
        tmp_path,
        critic_tensor_model_parallel_size=2,
        critic_pipeline_model_parallel_size=1,
        ppo_epochs=2,
        ppo_early_stop_kl=1e-3,
        bf16=True,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    records = finite_metrics(tmp_path, 2)
    for record, calls in zip(records, calls_by_iteration(tmp_path, 2), strict=True):
        assert_seen_as_in_the_data(calls)
        assert record.keys() >= CRITIC_FIELDS
        assert record["stopped_early"] == 1
        # Engines compute in float32, the actor in bfloat16.
        assert record["logprob_difference_mean"] < 0.02
        from_model = record["score_mean"] - length_score(calls)
        assert from_model == pytest.approx(reward_model_mean(calls), abs=0.1)

    # Two iterations of two epochs of two mini-batches: the critic takes all, the actor stops.
    assert list(spans(tmp_path, "critic step").values()) == [8, 8]
    taken = spans(tmp_path, "actor step").values()
    assert list(taken) == [records[-1]["optimizer_steps"]] * 2
    assert 2 <= records[-1]["optimizer_steps"] < 8


def reward_model_mean(calls: list[dict[str, Any]]) -> float:
    """What transformers makes of these responses, whose tokens are guessed from their text."""
    tokenizer = AutoTokenizer.from_pretrained(TOY / "actor")
    model = AutoModelForSequenceClassification.from_pretrained(TOY / "reward", dtype=torch.float32)
    scores = []
    for call in calls:
        prompt = tokenizer.encode(call["prompt"])
        response = tokenizer.encode(call["response"], add_special_tokens=False)
        if len(response) < MAX_NEW_TOKENS:
            response.append(tokenizer.eos_token_id)
        with torch.no_grad():
            scores.append(float(model(torch.tensor([prompt + response])).logits))
    return statistics.fmean(scores)
