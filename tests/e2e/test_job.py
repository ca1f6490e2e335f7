"""The whole job on real engines: it learns, resumes exactly, survives its engines, and exports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.e2e.jobs import TOY, Job, copy_checkpoint
from tests.e2e.runs import assert_equal_weights, metrics


@pytest.fixture(scope="module")
def four_iterations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run of four iterations, saved after two and four."""
    run = tmp_path_factory.mktemp("four")
    job = Job(
        run,
        train_iters=4,
        save=run / "checkpoints",
        save_interval=2,
        save_hf=run / "models",
        ppo_kl_target=0.1,
    )
    assert job.wait() == 0, job.output
    job.assert_nothing_left()
    return run


def test_every_iteration_is_measured(four_iterations: Path) -> None:
    records = metrics(four_iterations)
    assert [record["iteration"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert record["weight_version"] == record["iteration"] - 1
        assert record["consumed_samples"] == 16 * record["iteration"]
        # Both engines compute the same policy: float32, so differences are rounding.
        assert record["logprob_difference_max"] < 1e-4
        stages = sum(
            record[f"{stage}_s"] for stage in ("generation", "inference", "training", "weight_sync")
        )
        assert 0 < stages <= record["iteration_s"]
    assert records[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert records[-1]["kl_sequence"] > 0
    assert records[-1]["optimizer_steps"] == 8


def test_trace_shows_ranks_engines_and_stages(four_iterations: Path) -> None:
    events = json.loads((four_iterations / "trace.json").read_text())["traceEvents"]
    names = {event["name"] for event in events if event["ph"] == "X"}
    assert {"generation", "inference", "training", "weight_sync", "checkpoint"} <= names
    assert {"actor step", "critic step", "score", "sample 0", "sample 15"} <= names
    threads = {e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    assert any("engine 0" in name for name in threads)
    assert any("engine 1" in name for name in threads)


def test_saved_models_load_in_transformers(four_iterations: Path) -> None:
    folder = four_iterations / "models"
    trained = AutoModelForCausalLM.from_pretrained(folder / "actor", dtype=torch.float32)
    initial = AutoModelForCausalLM.from_pretrained(TOY / "actor", dtype=torch.float32)
    before, after = initial.state_dict(), trained.state_dict()
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    critic = AutoModelForSequenceClassification.from_pretrained(folder / "critic")
    assert critic.config.num_labels == 1
    assert AutoTokenizer.from_pretrained(folder / "actor").encode("a")


# vLLM as anyone would use it, without this project: reads a prompt's tokens, writes a response's.
VLLM_PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model, prompt, length = json.loads(sys.argv[1])
    engine = LLM(
        model=model, load_format="auto", dtype="float32", max_model_len=128, max_num_seqs=1,
        kv_cache_memory_bytes=64 << 20, enforce_eager=True,
    )
    greedy = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": prompt}], greedy)
    print("RESPONSE", json.dumps(list(outputs[0].outputs[0].token_ids)), flush=True)
"""


def test_saved_actor_loads_in_vllm(four_iterations: Path) -> None:
    folder = four_iterations / "models" / "actor"
    prompt = AutoTokenizer.from_pretrained(folder).encode("User: How do I dust the floor?")
    length = 24
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    vllm = subprocess.run(
        [sys.executable, "-c", VLLM_PROGRAM, json.dumps([str(folder), prompt, length])],
        cwd=four_iterations,  # not the repository, where Python would find this project
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert vllm.returncode == 0, vllm.stdout
    (response,) = (line for line in vllm.stdout.splitlines() if line.startswith("RESPONSE "))

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor([prompt])
    for _ in range(length):
        with torch.no_grad():
            best = model(tokens).logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, best], dim=1)
    assert json.loads(response.removeprefix("RESPONSE ")) == tokens[0, len(prompt) :].tolist()


def test_resumed_run_equals_uninterrupted_one_though_an_engine_is_killed(
    four_iterations: Path, tmp_path: Path
) -> None:
    checkpoints = copy_checkpoint(four_iterations, 2, tmp_path)
    job = Job(
        tmp_path,
        train_iters=4,
        load=checkpoints,
        save_hf=tmp_path / "models",
        ppo_kl_target=0.1,
    )
    job.wait_for("resumed after iteration 2")
    time.sleep(0.3)
    job.engine(rank=1).kill()
    assert job.wait() == 0, job.output
    job.assert_nothing_left()

    records = metrics(tmp_path)
    assert [record["iteration"] for record in records] == [1, 2, 3, 4]
    assert sum(record["engine_restarts"] for record in records[2:]) == 1
    undisturbed = metrics(four_iterations)
    for name in ("reward_mean", "kl", "policy_loss", "value_loss", "kl_coefficient", "actor_lr"):
        assert [r[name] for r in records] == [r[name] for r in undisturbed], name
    assert_equal_weights(tmp_path, four_iterations)
