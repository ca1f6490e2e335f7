"""The job of test_training.py on one process, without Megatron: plain torch and transformers."""

from __future__ import annotations

import zlib
from argparse import Namespace
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

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
Results = dict[str, Any]
Samples = list[tuple[list[int], list[int]]]
"""Prompt and response."""


class Reference:
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
        from megatron_rlhfuse.training.experience import mini_batches

        seed = zlib.crc32(f"{self.args.seed} {iteration}".encode())
        results: Results = {"actor": [], "critic": []}
        for epoch in mini_batches(BATCH, MINI_BATCH, EPOCHS, seed):
            for rows in epoch:
                part = select(experience, rows)
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
        rate = learning_rate(self.steps) if name == "actor" else 4e-4
        for group in self.optimizers[name].param_groups:
            group["lr"] = rate
        self.optimizers[name].step()
        metrics = {key: float(value) for key, value in output.metrics.items()}
        return {"grad_norm": float(norm), "learning_rate": rate, **metrics}

    def policy(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Log-probability of and entropy at every response token, [batch, response]."""
        tokens = _padded(samples)
        distribution = (self.actor(tokens).logits / TEMPERATURE).log_softmax(-1)
        row, column, position = _response_positions(samples)
        here = distribution[row, position]
        token = tokens[row, position + 1]
        empty = torch.zeros(len(samples), max(len(response) for _, response in samples))
        log_probs = empty.index_put((row, column), distribution[row, position, token])
        return log_probs, empty.index_put((row, column), -(here.exp() * here).sum(-1))

    def _policy_loss(self, part: Any) -> Any:
        from megatron_rlhfuse.rlhf.losses import PolicyBatch, PolicyLossOptions, policy_loss

        log_probs, entropy = self.policy(samples_of(part))
        batch = PolicyBatch(
            log_probs=log_probs,
            old_log_probs=part.old_log_probs,
            advantages=part.advantages,
            mask=part.mask,
            weights=part.mask / part.mask.sum(),
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

        samples = samples_of(part)
        hidden = self.critic.model(_padded(samples)).last_hidden_state
        outputs = self.critic.score(hidden).squeeze(-1)
        row, column, position = _response_positions(samples)
        empty = torch.zeros(part.mask.shape)
        values = empty.index_put((row, column), outputs[row, position])
        weights = part.mask / part.mask.sum()
        batch = ValueBatch(values, part.old_values, part.returns, part.mask, weights)
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


def select(experience: Any, rows: Tensor) -> Any:
    """Some rows of an experience as one of its own."""
    samples = samples_of(experience)
    chosen = [samples[row] for row in rows.tolist()]
    width = max(len(response) for _, response in chosen)
    parts = {
        field.name: value[rows] if value.dim() == 1 else value[rows, :width]
        for field in fields(experience)
        if isinstance(value := getattr(experience, field.name), Tensor)
    }
    return replace(
        experience, sequences=type(experience.sequences).of(*zip(*chosen, strict=True)), **parts
    )


def samples_of(experience: Any) -> Samples:
    """Prompt and response of every row."""
    sequences, samples, start = experience.sequences, [], 0
    lengths = zip(sequences.prompt_lengths, sequences.response_lengths, strict=True)
    for prompt, response in lengths:
        middle, end = start + int(prompt), start + int(prompt + response)
        tokens = sequences.tokens.tolist()
        samples.append((tokens[start:middle], tokens[middle:end]))
        start = end
    return samples


def _padded(samples: Samples) -> Tensor:
    rows = [torch.tensor([*prompt, *response]) for prompt, response in samples]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _response_positions(samples: Samples) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column of the response, and position that predicts it, of every response token."""
    places = [
        (row, column, len(prompt) + column - 1)
        for row, (prompt, response) in enumerate(samples)
        for column in range(len(response))
    ]
    row, column, position = torch.tensor(places).T
    return row, column, position


def learning_rate(step: int) -> float:
    """Warm-up over one iteration from 2e-4 to 6e-4, then down to 2e-4 over the other one."""
    if step <= STEPS:
        return 2e-4 + 4e-4 * step / STEPS
    return 6e-4 - 4e-4 * (step - STEPS) / STEPS
