"""Builds the parts of a job on this rank: process groups, models, inference instance.

Every rank calls these in the same order; most of it is collective.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from megatron_rlhfuse import network, terminal
from megatron_rlhfuse.data import Prompt, PromptDataset
from megatron_rlhfuse.inference.instance import InferenceInstance, InferenceModels
from megatron_rlhfuse.inference.queue import SampleQueue
from megatron_rlhfuse.inference.reward_function import call_reward_function, load_reward_function
from megatron_rlhfuse.last_words import refuse
from megatron_rlhfuse.layouts import training_layouts
from megatron_rlhfuse.models.build import build_model
from megatron_rlhfuse.models.hf_config import Head, ModelShape, apply_shape
from megatron_rlhfuse.models.load import load_hf_weights, load_stream
from megatron_rlhfuse.observe.trace import Tracer
from megatron_rlhfuse.pipeline.groups import Layout, ModelGroups, build_process_groups
from megatron_rlhfuse.pipeline.model import PipelinedModel
from megatron_rlhfuse.rollout.prompt_rounds import extra_prompts
from megatron_rlhfuse.rollout.samples import Sample
from megatron_rlhfuse.rollout.wire import Limits
from megatron_rlhfuse.training.heads import PolicyHead
from megatron_rlhfuse.training.trained_model import (
    TrainedModel,
    TrainedModels,
    critic_arguments,
)


def start_megatron() -> None:
    """Starts torch.distributed and Megatron's own state, in the actor's layout."""
    from megatron.training.initialize import initialize_megatron

    network.keep_ranks_local()
    with terminal.printing_to_log():
        initialize_megatron(allow_no_cuda=True)


def load_prompts(args: argparse.Namespace) -> tuple[Any, PromptDataset]:
    """The actor's tokenizer, and the prompts that it has read. Refuses what cannot be used."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(args.actor_model)
    except (ValueError, OSError) as fault:
        refuse(f"--actor-model {args.actor_model}: its tokenizer cannot be loaded: {fault}")
    try:
        dataset = PromptDataset(
            args.prompt_data,
            tokenizer,
            args.rollout_max_prompt_tokens,
            args.rollout_overlong_prompts,
        )
    except (ValueError, OSError) as fault:
        refuse(str(fault))
    prompts = (dataset[index] for index in range(len(dataset)))
    largest = max(max(prompt.token_ids) for prompt in prompts)
    if largest >= args.actor_shape.vocab_size:
        refuse(
            f"--actor-model {args.actor_model}: its tokenizer makes token {largest} of "
            f"--prompt-data, its model has {args.actor_shape.vocab_size}"
        )
    return tokenizer, dataset


def connect_queue(args: argparse.Namespace) -> SampleQueue:
    """The queues between the stages, which drop what no rank of this job can send. COLLECTIVE."""
    copies = args.rollout_samples_per_prompt
    trained = args.rollout_batch_size // copies
    limits = Limits(
        samples=(trained + extra_prompts(trained, args.rollout_extra_prompts)) * copies,
        prompt_tokens=args.rollout_max_prompt_tokens,
        response_tokens=args.rollout_max_new_tokens,
        vocabulary=args.actor_shape.vocab_size,
        instances=args.rollout_instances,
        has_reference=args.reference_shape is not None,
        has_values=args.uses_critic,
    )
    return SampleQueue.connect(args.rlhfuse_stage_timeout, args.rollout_instances, limits)


def updates_per_iteration(args: argparse.Namespace) -> int:
    """Optimizer steps of one iteration that is not stopped early."""
    return args.ppo_epochs * (args.rollout_batch_size // args.global_batch_size)


def build_trained_models(args: argparse.Namespace) -> TrainedModels:
    """Actor and critic, loaded from their folders. COLLECTIVE."""
    steps = updates_per_iteration(args)
    actor_layout, critic_layout = training_layouts(args)
    actor = TrainedModel(
        "actor",
        args,
        args.actor_shape,
        args.actor_model,
        "language",
        _groups(args, actor_layout, "actor"),
        steps,
    )
    if not args.uses_critic:
        return TrainedModels(actor, None)
    tensor, pipeline = (
        args.critic_tensor_model_parallel_size,
        args.critic_pipeline_model_parallel_size,
    )
    critic = TrainedModel(
        "critic",
        apply_shape(critic_arguments(args), args.critic_shape, tensor, pipeline, "critic-"),
        args.critic_shape,
        args.critic_model,
        "scalar",
        _groups(args, critic_layout, "critic"),
        steps,
    )
    return TrainedModels(actor, critic)


class Inference:
    """This rank's inference instance, and the copies of trained weights that it scores with."""

    def __init__(
        self, args: argparse.Namespace, trained: TrainedModels, tokenizer: object, tracer: Tracer
    ) -> None:
        self._args = args
        layout = Layout.blocks(
            args.world_size,
            args.rlhfuse_inference_tensor_parallel_size,
            args.rlhfuse_inference_pipeline_parallel_size,
        )
        self._groups = _groups(args, layout, "inference")
        self._copies: list[tuple[TrainedModel, PipelinedModel]] = []
        models = InferenceModels(
            actor=self._shared(trained.actor, "language"),
            reference=self._frozen(args.reference_shape, args.reference_model, "language"),
            critic=self._shared(trained.critic, "scalar") if trained.critic else None,
            reward=self._frozen(args.reward_shape, args.reward_model, "scalar"),
        )
        models.to_host()
        head = PolicyHead(
            args.actor_shape.vocab_size, args.rollout_temperature, self._groups.pgc.tp
        )
        self.instance = InferenceInstance(
            models,
            self._groups,
            head,
            _text_score(args, tokenizer),
            micro_batch_size=args.rlhfuse_inference_micro_batch_size,
            pack_sequences=args.rlhfuse_pack_sequences,
            tracer=tracer,
        )

    def refresh(self) -> None:
        """Brings the copies up to the trained weights. COLLECTIVE over all ranks."""
        for source, copy_ in self._copies:
            load_stream(copy_.module, source.hf_weights(), source.shape, self._groups)

    def _shared(self, model: TrainedModel, head: Head) -> PipelinedModel:
        """The model in training itself where the layouts agree, else a copy."""
        if model.groups.layout == self._groups.layout:
            return model
        built = self._build(model.shape, head)
        self._copies.append((model, built))
        return built

    def _frozen(self, shape: ModelShape | None, folder: str, head: Head) -> PipelinedModel | None:
        if shape is None:
            return None
        model = self._build(shape, head)
        load_hf_weights(model.module, folder, shape, self._groups)
        return model

    def _build(self, shape: ModelShape, head: Head) -> PipelinedModel:
        layout = self._groups.layout
        args = apply_shape(copy.copy(self._args), shape, layout.tp, layout.pp, "rlhfuse-inference-")
        model = build_model(args, self._groups, head, args.rlhfuse_pack_sequences)
        model.requires_grad_(False)
        return PipelinedModel(model, self._groups)


def _groups(args: argparse.Namespace, layout: Layout, name: str) -> ModelGroups:
    timeout = timedelta(minutes=args.distributed_timeout_minutes)
    groups = build_process_groups(layout, name, timeout)
    assert groups is not None, "every rank holds a part of every model"
    return groups


def _text_score(
    args: argparse.Namespace, tokenizer: object
) -> Callable[[Sample, Prompt], float] | None:
    if not args.reward_function:
        return None
    function = load_reward_function(args.reward_function)

    def score(sample: Sample, prompt: Prompt) -> float:
        response = tokenizer.decode(sample.response, skip_special_tokens=True)  # type: ignore[attr-defined]
        value = call_reward_function(function, prompt.text, response, prompt.fields)
        assert math.isfinite(value)
        return value

    return score
