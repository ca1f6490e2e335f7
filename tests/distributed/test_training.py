"""PPO's updates on Megatron, in many layouts, against plain torch on transformers models.

The reference is written here without Megatron: whole mini-batches on one process, the losses of
rlhf/, autograd, torch's AdamW and clipping. One launch of four ranks runs every case; the tests
read their part of its results.
"""

from __future__ import annotations

import itertools
import zlib
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.job_helpers import (
    changed,
    make_folders,
    make_sample,
    make_scored,
    parse_job,
)
from tests.distributed.model_helpers import seed_megatron

RANKS = 4
BATCH, MINI_BATCH, EPOCHS = 32, 16, 2
STEPS = EPOCHS * BATCH // MINI_BATCH  # of one iteration
KL_COEFFICIENT = 0.2
TEMPERATURE = 0.7
ADAM_EPS = 1e-4  # large: Adam then does not blow up gradients that are rounding errors

# A term of every kind; the clipping of gradients bites; nothing is the same for both models.
FLAGS = f"""
    --rollout-batch-size {BATCH} --global-batch-size {MINI_BATCH} --micro-batch-size 2
    --train-iters 2 --ppo-epochs {EPOCHS} --rollout-temperature {TEMPERATURE}
    --lr 6e-4 --min-lr 2e-4 --lr-warmup-iters 1 --lr-warmup-init 2e-4 --lr-decay-style linear
    --weight-decay 0.1 --clip-grad 0.5 --adam-eps {ADAM_EPS}
    --critic-lr 4e-4 --critic-min-lr 4e-4 --critic-lr-warmup-iters 0
    --critic-weight-decay 0.02 --critic-clip-grad 0.3
    --ppo-kl-placement loss --ppo-kl-coef {KL_COEFFICIENT} --ppo-kl-estimator k3
    --ppo-entropy-coef 0.01 --ppo-dual-clip 3 --ppo-tis-cap 1.5
"""
# Actor's and critic's tensor and pipeline sizes, and what else differs from FLAGS.
CASES: dict[str, tuple[tuple[int, int], tuple[int, int], dict[str, object]]] = {
    "PP2 DP2, critic TP2 DP2": ((1, 2), (2, 1), {}),
    "TP2 DP2, critic PP2 DP2": ((2, 1), (1, 2), {}),
    "TP2 PP2, critic PP4": ((2, 2), (1, 4), {"critic_micro_batch_size": 1}),
    "DP4": ((1, 1), (1, 1), {"micro_batch_size": 1, "critic_micro_batch_size": 4}),
    "DP4, other micro-batches, overlapped reduction": (
        (1, 1),
        (1, 1),
        {"micro_batch_size": 4, "critic_micro_batch_size": 1, "overlap_grad_reduce": True},
    ),
    "PP4, recomputed activations": (
        (1, 4),
        (1, 1),
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
}
LONG_CASE = "PP2 DP2, critic TP2 DP2"  # runs two iterations, the others one
# float32 sums in another order; a wrong factor anywhere is off by far more.
WEIGHT_TOLERANCE = 1e-6
UPDATE_TOLERANCE = 2e-4

Results = dict[str, Any]


# ---------------------------------------------------------------- on every rank


def check_training(folder: str) -> Results:
    root = Path(folder)
    if dist.get_rank() == 0:
        make_folders(root, actor="qwen2")  # tied embeddings, biases
    dist.barrier()
    args = parse_job(root, *FLAGS.split())
    seed_megatron()
    reference = _Reference(args)
    experiences = [_experience(args, reference, iteration) for iteration in (1, 2)]
    if dist.get_rank() == 0:  # which alone has something to compare with
        reference.run(experiences)
    cases = {}
    for name, (actor, critic, changes) in CASES.items():
        job = _Job(_in_layout(args, actor, critic, **changes))
        count = 2 if name == LONG_CASE else 1
        updates = [job.update(i, e) for i, e in enumerate(experiences[:count], start=1)]
        errors = reference.errors(job.weights(), count) if dist.get_rank() == 0 else job.drain()
        cases[name] = {"updates": updates, "errors": errors, "parts": job.parts()}
    rows = _first_mini_batch(args)
    return {
        "expected": reference.updates,
        "cases": cases,
        "early stop": _early_stop(args, experiences),
        "warm-up": _critic_warmup(args, experiences),
        "sgd": _sgd(args, experiences[0].select(rows)),
        "bfloat16": _bfloat16(args, experiences[0].select(rows)),
    }


def _first_mini_batch(args: Namespace) -> Tensor:
    from megatron_rlhfuse.training.experience import mini_batches

    return mini_batches(BATCH, MINI_BATCH, 1, zlib.crc32(f"{args.seed} 1".encode()))[0][0]


def _experience(args: Namespace, reference: _Reference, iteration: int) -> Any:
    """A rollout batch of random tokens, scored by something near the actor."""
    from megatron_rlhfuse.training.batches import TokenBatch
    from megatron_rlhfuse.training.experience import build_experience
    from megatron_rlhfuse.training.ppo import advantage_options

    scored = []
    for sample_id in range(BATCH):
        seed = 1000 * iteration + sample_id
        sample = make_sample(sample_id, seed)
        with torch.no_grad():
            log_probs, _ = reference.policy(TokenBatch.pad([sample.prompt], [sample.response], 0))
        scored.append(make_scored(sample, log_probs[0], seed))
    return build_experience(scored, advantage_options(args), KL_COEFFICIENT, pad_token=0)


def _in_layout(
    args: Namespace, actor: tuple[int, int], critic: tuple[int, int], **changes: object
) -> Namespace:
    return changed(
        args,
        tensor_model_parallel_size=actor[0],
        pipeline_model_parallel_size=actor[1],
        critic_tensor_model_parallel_size=critic[0],
        critic_pipeline_model_parallel_size=critic[1],
        **changes,
    )


class _Job:
    """Models and PPO of one case."""

    def __init__(self, args: Namespace) -> None:
        from megatron_rlhfuse.assembly import build_trained_models
        from megatron_rlhfuse.observe.trace import Tracer
        from megatron_rlhfuse.training.ppo import PPO

        self.models = build_trained_models(args)
        self.ppo = PPO(args, self.models, Tracer("unused", 0, enabled=False))
        self.stopped_early = False

    def update(self, iteration: int, experience: Any) -> Results:
        """Metrics, gradient norm and learning rate of every step."""
        updates = self.ppo.update(iteration, experience, KL_COEFFICIENT)
        self.stopped_early = updates.stopped_early
        return {
            name: [
                {"grad_norm": s.grad_norm, "learning_rate": s.learning_rate, **s.metrics}
                for s in steps
            ]
            for name, steps in (("actor", updates.actor), ("critic", updates.critic))
        }

    def parts(self) -> dict[str, tuple[list[int], float]]:
        """By model: this rank's stage and tensor part, and a sum of the weights it holds."""
        found = {}
        for name, model in self.models.by_name().items():
            place = model.groups.place
            total = sum(float(p.double().sum()) for p in model.module.parameters())
            found[name] = ([place.stage, place.tensor], total)
        return found

    def drain(self) -> dict[str, Any]:
        """Takes part in another rank's `weights`."""
        self.weights()
        return {}

    def weights(self) -> dict[str, Tensor]:
        """COLLECTIVE. All weights by model and Hugging Face name."""
        return {
            f"{model}.{name}": tensor
            for model, trained in self.models.by_name().items()
            for name, tensor in trained.hf_weights()
        }


class _Reference:
    """The same job on one process, with nothing of Megatron in it."""

    def __init__(self, args: Namespace) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        self.args = args
        torch.manual_seed(0)
        self.actor = AutoModelForCausalLM.from_pretrained(args.actor_model)
        self.critic = AutoModelForSequenceClassification.from_pretrained(args.critic_model)
        self.updates: list[Results] = []
        self.history = [self.weights()]
        self.optimizers = {
            "actor": self._optimizer(self.actor, args.weight_decay),
            "critic": self._optimizer(self.critic, args.critic_weight_decay),
        }
        self.steps = 0

    def run(self, experiences: list[Any]) -> None:
        """Trains; `updates` are what each iteration reports, `history` the weights after it."""
        for iteration, experience in enumerate(experiences, start=1):
            self.updates.append(self._update(iteration, experience))
            self.history.append(self.weights())

    def _optimizer(self, model: torch.nn.Module, weight_decay: float) -> torch.optim.AdamW:
        """Biases and norms are not decayed."""
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=ADAM_EPS)

    def _update(self, iteration: int, experience: Any) -> Results:
        from megatron_rlhfuse.rlhf.losses import aggregation_weights
        from megatron_rlhfuse.training.experience import mini_batches

        seed = zlib.crc32(f"{self.args.seed} {iteration}".encode())
        results: Results = {"actor": [], "critic": []}
        for epoch in mini_batches(BATCH, MINI_BATCH, EPOCHS, seed):
            for rows in epoch:
                part = experience.select(rows)
                part = replace(part, weights=aggregation_weights(part.mask, "token-mean"))
                results["actor"].append(self._step("actor", self._policy_loss(part)))
                results["critic"].append(self._step("critic", self._value_loss(part)))
                self.steps += 1
        return results

    def _step(self, name: str, output: Any) -> dict[str, float]:
        model = getattr(self, name)
        model.zero_grad()
        output.loss.backward()
        clip = 0.5 if name == "actor" else 0.3
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        rate = _learning_rate(self.steps) if name == "actor" else 4e-4
        for group in self.optimizers[name].param_groups:
            group["lr"] = rate
        self.optimizers[name].step()
        metrics = {key: float(value) for key, value in output.metrics.items()}
        return {"grad_norm": float(norm), "learning_rate": rate, **metrics}

    def policy(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Log-probability of and entropy at every response token, [batch, response]."""
        distribution = (self.actor(batch.tokens).logits / TEMPERATURE).log_softmax(-1)
        row, column, position = _response_positions(batch)
        here = distribution[row, position]
        token = batch.tokens[row, position + 1]
        empty = torch.zeros(batch.response_mask().shape)
        log_probs = empty.index_put((row, column), distribution[row, position, token])
        return log_probs, empty.index_put((row, column), -(here.exp() * here).sum(-1))

    def _policy_loss(self, part: Any) -> Any:
        from megatron_rlhfuse.rlhf.losses import PolicyBatch, PolicyLossOptions, policy_loss

        log_probs, entropy = self.policy(part.batch)
        batch = PolicyBatch(
            log_probs=log_probs,
            old_log_probs=part.old_log_probs,
            advantages=part.advantages,
            mask=part.mask,
            weights=part.weights,
            rollout_log_probs=part.rollout_log_probs,
            reference_log_probs=part.reference_log_probs,
            entropy=entropy,
        )
        options = PolicyLossOptions(
            clip_low=0.2,
            clip_high=0.2,
            dual_clip=3.0,
            tis_cap=1.5,
            entropy_coefficient=0.01,
            kl_coefficient=KL_COEFFICIENT,
            kl_estimator="k3",
        )
        return policy_loss(batch, options)

    def _value_loss(self, part: Any) -> Any:
        from megatron_rlhfuse.rlhf.losses import ValueBatch, value_loss

        hidden = self.critic.model(part.batch.tokens).last_hidden_state
        outputs = self.critic.score(hidden).squeeze(-1)
        row, column, position = _response_positions(part.batch)
        empty = torch.zeros(part.mask.shape)
        values = empty.index_put((row, column), outputs[row, position])
        batch = ValueBatch(values, part.old_values, part.returns, part.mask, part.weights)
        return value_loss(batch, 0.2)

    def weights(self) -> dict[str, Tensor]:
        return {
            f"{model}.{name}": parameter.detach().clone()
            for model in ("actor", "critic")
            for name, parameter in getattr(self, model).named_parameters()
        }

    def errors(self, found: dict[str, Tensor], iterations: int) -> dict[str, tuple[float, float]]:
        """By tensor: error relative to the weights, and relative to what training changed."""
        start, expected = self.history[0], self.history[iterations]
        assert found.keys() == expected.keys()
        errors = {}
        for name, tensor in found.items():
            error = (tensor - expected[name]).norm()
            moved = (expected[name] - start[name]).norm()
            errors[name] = (float(error / expected[name].norm()), float(error / moved))
        return errors


def _response_positions(batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column of the response, and position that predicts it, of every response token."""
    places = [
        (row, column, prompt + column - 1)
        for row, (prompt, response) in enumerate(
            zip(batch.prompt_lengths.tolist(), batch.response_lengths.tolist(), strict=True)
        )
        for column in range(response)
    ]
    row, column, position = torch.tensor(places).T
    return row, column, position


def _learning_rate(step: int) -> float:
    """Warm-up over one iteration from 2e-4 to 6e-4, then down to 2e-4 over the other one."""
    if step <= STEPS:
        return 2e-4 + 4e-4 * step / STEPS
    return 6e-4 - 4e-4 * (step - STEPS) / STEPS


def _early_stop(args: Namespace, experiences: list[Any]) -> Results:
    """The samples' log-probabilities are far from the actor's, so the first step exceeds any."""
    job = _Job(_in_layout(args, (1, 2), (1, 1), ppo_early_stop_kl=1e-9))
    updates = [job.update(i, e) for i, e in enumerate(experiences, start=1)]
    return {"updates": updates, "stopped": job.stopped_early, "steps": job.ppo.optimizer_steps}


def _critic_warmup(args: Namespace, experiences: list[Any]) -> Results:
    job = _Job(_in_layout(args, (2, 1), (1, 1), critic_warmup_iters=1))
    history = [job.weights()]
    updates = []
    for iteration, experience in enumerate(experiences, start=1):
        updates.append(job.update(iteration, experience))
        history.append(job.weights())
    same = [
        {
            model: all(torch.equal(a[n], b[n]) for n in a if n.startswith(model))
            for model in ("actor", "critic")
        }
        for a, b in itertools.pairwise(history)
    ]
    return {"same": same, "actor steps": [len(update["actor"]) for update in updates]}


def _sgd(args: Namespace, experience: Any) -> dict[str, float]:
    """One plain step is the learning rate times the clipped gradient: no factor can hide."""
    args = _in_layout(
        args,
        (1, 2),
        (2, 1),
        optimizer="sgd",
        sgd_momentum=0.0,
        weight_decay=0.0,
        critic_weight_decay=0.0,
        start_weight_decay=0.0,
        end_weight_decay=0.0,
        ppo_epochs=1,
    )
    job = _Job(args)
    before = job.weights()
    job.update(1, experience)
    after = job.weights()
    lengths = {}
    for model in ("actor", "critic"):
        moved = sum(float((after[n] - before[n]).norm() ** 2) for n in after if n.startswith(model))
        lengths[model] = moved**0.5
    return lengths


def _bfloat16(args: Namespace, experience: Any) -> Results:
    """The gradient norm of the first step, with float32 master weights behind bfloat16 ones."""
    args = _in_layout(
        args,
        (1, 2),
        (2, 1),
        bf16=True,
        params_dtype=torch.bfloat16,
        accumulate_allreduce_grads_in_fp32=True,
        ppo_epochs=1,
    )
    job = _Job(args)
    update = job.update(1, experience)
    return {
        "dtypes": sorted({str(p.dtype) for p in job.models.actor.module.parameters()}),
        "norms": {name: update[name][0]["grad_norm"] for name in ("actor", "critic")},
    }


# ---------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def results(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return run_ranks(check_training, RANKS, str(tmp_path_factory.mktemp("job")), timeout=300)


@pytest.mark.parametrize("case", CASES)
def test_weights_equal_those_of_plain_torch(results: list[Results], case: str) -> None:
    errors = results[0]["cases"][case]["errors"]
    assert {name.split(".")[0] for name in errors} == {"actor", "critic"}
    for name, (weight, update) in errors.items():
        assert weight < WEIGHT_TOLERANCE, name
        assert update < UPDATE_TOLERANCE, name


@pytest.mark.parametrize("case", CASES)
def test_replicas_hold_equal_weights(results: list[Results], case: str) -> None:
    for model in ("actor", "critic"):
        parts = [rank["cases"][case]["parts"][model] for rank in results]
        for place, total in parts:
            assert [t for p, t in parts if p == place] == [total] * [p for p, _ in parts].count(
                place
            )


@pytest.mark.parametrize("case", CASES)
def test_metrics_are_those_of_the_whole_mini_batch(results: list[Results], case: str) -> None:
    updates = results[0]["cases"][case]["updates"]
    for update, expected in zip(updates, results[0]["expected"], strict=False):
        for model in ("actor", "critic"):
            assert len(update[model]) == STEPS
            for step, wanted in zip(update[model], expected[model], strict=True):
                assert step.keys() == wanted.keys()
                for name, value in wanted.items():
                    # A rounding error may put one token on the other side of a bound.
                    slack = 0.02 if name.endswith("fraction") else 1e-5
                    assert step[name] == pytest.approx(value, rel=1e-4, abs=slack), name


def test_metrics_are_equal_on_every_rank(results: list[Results]) -> None:
    for case in CASES:
        everywhere = [rank["cases"][case]["updates"] for rank in results]
        assert everywhere == everywhere[:1] * RANKS, case


def test_the_reference_clips_its_gradients(results: list[Results]) -> None:
    # Else the tests above would say nothing of clipping.
    for update in results[0]["expected"]:
        assert all(step["grad_norm"] > 0.5 for step in update["actor"])
        assert all(step["grad_norm"] > 0.3 for step in update["critic"])


def test_learning_rates_count_iterations(results: list[Results]) -> None:
    first, second = results[0]["cases"][LONG_CASE]["updates"]
    rates = [step["learning_rate"] for step in first["actor"] + second["actor"]]
    assert rates == pytest.approx([_learning_rate(step) for step in range(2 * STEPS)])
    assert rates[0] == pytest.approx(2e-4) and rates[STEPS] == pytest.approx(6e-4)
    assert {step["learning_rate"] for step in first["critic"] + second["critic"]} == {4e-4}


def test_early_stop_stops_the_actor_alone_and_for_one_iteration(results: list[Results]) -> None:
    for rank in results:
        stop = rank["early stop"]
        assert stop["stopped"]
        assert [len(update["actor"]) for update in stop["updates"]] == [1, 1]
        assert [len(update["critic"]) for update in stop["updates"]] == [STEPS, STEPS]
        assert stop["steps"] == 2


def test_early_stop_does_not_hold_back_the_learning_rate(results: list[Results]) -> None:
    (first,), (second,) = (update["actor"] for update in results[0]["early stop"]["updates"])
    assert first["learning_rate"] == pytest.approx(_learning_rate(0))
    assert second["learning_rate"] == pytest.approx(_learning_rate(STEPS))


def test_critic_warm_up_leaves_the_actor_alone(results: list[Results]) -> None:
    for rank in results:
        warm_up = rank["warm-up"]
        assert warm_up["same"] == [
            {"actor": True, "critic": False},
            {"actor": False, "critic": False},
        ]
        assert warm_up["actor steps"] == [0, STEPS]


def test_a_plain_step_is_as_long_as_the_clipped_gradient(results: list[Results]) -> None:
    lengths = results[0]["sgd"]
    assert lengths["actor"] == pytest.approx(2e-4 * 0.5, rel=1e-3)
    assert lengths["critic"] == pytest.approx(4e-4 * 0.3, rel=1e-3)


def test_bfloat16_has_nearly_the_gradients_of_float32(results: list[Results]) -> None:
    found, expected = results[0]["bfloat16"], results[0]["expected"][0]
    assert found["dtypes"] == ["torch.bfloat16"]
    for model, norm in found["norms"].items():
        assert norm == pytest.approx(expected[model][0]["grad_norm"], rel=0.1), model
