"""PPO's updates: epochs of mini-batches, the actor's step and the critic's on each.

The two steps are independent; the critic goes on where the actor stops early.
"""

from __future__ import annotations

import argparse
import zlib
from dataclasses import dataclass, field, replace

from megatron_rlhfuse import platform
from megatron_rlhfuse.dispatch.micro_batches import Figures
from megatron_rlhfuse.observe.trace import Tracer
from megatron_rlhfuse.rlhf.losses import PolicyLossOptions, aggregation_weights
from megatron_rlhfuse.training.dispatching import Dispatcher
from megatron_rlhfuse.training.experience import AdvantageOptions, Experience, mini_batches
from megatron_rlhfuse.training.fused_training import FusedTraining, ModelStep
from megatron_rlhfuse.training.heads import PolicyHead
from megatron_rlhfuse.training.steps import (
    LossScale,
    policy_metrics,
    policy_step,
    value_metrics,
    value_step,
)
from megatron_rlhfuse.training.trained_model import StepResult, TrainedModel, TrainedModels
from megatron_rlhfuse.training.training_data import MiniBatch, TrainingData


@dataclass
class Updates:
    """The optimizer steps of one iteration."""

    actor: list[StepResult] = field(default_factory=list)
    critic: list[StepResult] = field(default_factory=list)
    stopped_early: bool = False
    dispatch: list[Figures] = field(default_factory=list)
    """How the samples of every step of either model were dealt out."""


class PPO:
    """Trains actor and critic on a rollout batch.

    `fused` trains the two at once, where both take a step; None trains one after the other.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        models: TrainedModels,
        tracer: Tracer,
        fused: FusedTraining | None = None,
    ) -> None:
        self._args = args
        self._models = models
        self._tracer = tracer
        self._fused = fused
        self._dispatchers = {name: Dispatcher(model) for name, model in models.by_name().items()}
        self._options = policy_loss_options(args)
        self._value_clip = args.ppo_value_clip or None
        self._head = PolicyHead(
            args.actor_shape.vocab_size, args.rollout_temperature, models.actor.groups.pgc.tp
        )
        self.optimizer_steps = 0

    def update(self, iteration: int, experience: Experience, kl_coefficient: float) -> Updates:
        """All epochs and mini-batches of an iteration. COLLECTIVE over all ranks.

        kl_coefficient: the controller's value, used where the KL is a term of the loss.
        """
        args = self._args
        in_loss = args.ppo_kl_placement == "loss"
        options = replace(self._options, kl_coefficient=kl_coefficient if in_loss else 0.0)
        updates = Updates()
        order = mini_batches(
            len(experience.scores), args.global_batch_size, args.ppo_epochs,
            seed=zlib.crc32(f"{args.seed} {iteration}".encode()),
        )  # fmt: skip
        train_actor = iteration > args.critic_warmup_iters
        data = TrainingData.of(experience, platform.device())
        for rows in (rows for epoch in order for rows in epoch):
            weights = aggregation_weights(experience.mask[rows], args.ppo_loss_aggregation)
            # Tokens of a sample weigh the same: what its first one does.
            mini_batch = MiniBatch(data, rows, weights[:, 0])
            if not train_actor or updates.stopped_early:
                self._models.actor.skip_step()
                if self._models.critic is not None:
                    updates.critic.append(self._step_critic(self._models.critic, mini_batch))
                continue
            actor, critic = self._step_both(mini_batch, options)
            updates.actor.append(actor)
            updates.critic += critic
            limit = args.ppo_early_stop_kl
            updates.stopped_early = limit is not None and actor.metrics["approx_kl"] > limit
        self.optimizer_steps += len(updates.actor)
        for dispatcher in self._dispatchers.values():
            updates.dispatch += dispatcher.take_figures()
        return updates

    def _step_both(
        self, mini_batch: MiniBatch, options: PolicyLossOptions
    ) -> tuple[StepResult, list[StepResult]]:
        """The actor's step and, if there is one, the critic's."""
        critic = self._models.critic
        step = self._actor_step(mini_batch, options)
        if self._fused is not None and critic is not None:
            actor, other = self._fused.step(step, self._critic_step(critic, mini_batch))
            return actor, [other]
        with self._tracer.span("actor step", "actor_training"):
            result = self._models.actor.step(step.forward_step, step.micro_batches, step.metrics)
        return result, [] if critic is None else [self._step_critic(critic, mini_batch)]

    def _step_critic(self, critic: TrainedModel, mini_batch: MiniBatch) -> StepResult:
        step = self._critic_step(critic, mini_batch)
        with self._tracer.span("critic step", "critic_training"):
            return critic.step(step.forward_step, step.micro_batches, step.metrics)

    def _actor_step(self, mini_batch: MiniBatch, options: PolicyLossOptions) -> ModelStep:
        actor = self._models.actor
        micro_batches = self._dispatchers[actor.name].micro_batches(mini_batch)
        scale = LossScale(len(micro_batches), actor.replicas)
        return ModelStep(
            policy_step(self._head, options, scale),
            micro_batches,
            policy_metrics(options),
            actor.args.micro_batch_tokens,
        )

    def _critic_step(self, critic: TrainedModel, mini_batch: MiniBatch) -> ModelStep:
        micro_batches = self._dispatchers[critic.name].micro_batches(mini_batch)
        scale = LossScale(len(micro_batches), critic.replicas)
        return ModelStep(
            value_step(self._value_clip, scale),
            micro_batches,
            value_metrics(self._value_clip),
            critic.args.micro_batch_tokens,
        )


def policy_loss_options(args: argparse.Namespace) -> PolicyLossOptions:
    """The `--ppo-*` flags of the policy loss; the KL coefficient comes with each update."""
    return PolicyLossOptions(
        clip_low=args.ppo_clip,
        clip_high=args.ppo_clip_high,
        dual_clip=args.ppo_dual_clip,
        tis_cap=args.ppo_tis_cap,
        entropy_coefficient=args.ppo_entropy_coef,
        kl_coefficient=0.0,
        kl_estimator=args.ppo_kl_estimator,
    )


def advantage_options(args: argparse.Namespace) -> AdvantageOptions:
    """The flags that turn scores into advantages."""
    return AdvantageOptions(
        estimator=args.advantage_estimator,
        gamma=args.ppo_gamma,
        lam=args.ppo_lambda,
        whiten=args.ppo_whiten_advantages,
        normalize_std=args.ppo_grpo_normalize_std,
        kl_estimator=args.ppo_kl_estimator,
        kl_in_reward=args.ppo_kl_placement == "reward",
        reward_clip=args.ppo_reward_clip,
        missing_eos_penalty=args.ppo_missing_eos_penalty,
        samples_per_prompt=args.rollout_samples_per_prompt,
    )
