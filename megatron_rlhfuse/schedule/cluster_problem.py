"""From the description of a cluster to the layout of its models and the fusion problem."""

from __future__ import annotations

from megatron_rlhfuse.schedule.cluster import ROLES, Cluster, ClusterModel
from megatron_rlhfuse.schedule.estimate import estimate_stages, p2p_milliseconds
from megatron_rlhfuse.schedule.layout import Placement, StageCosts, fusion_problem, place
from megatron_rlhfuse.schedule.presets import TransformerShape
from megatron_rlhfuse.schedule.problem import Problem, parse_problem, problem_to_json


def plan_cluster(cluster: Cluster) -> tuple[Placement, Problem]:
    """Where the models stand, and the fusion problem of one mini-batch: times in ms, memory in GB.

    Raises ProblemError where the models cannot be laid out or do not fit.
    """
    actor, critic = cluster.models
    placement = place(actor.parallelism, critic.parallelism, ROLES)
    micro_batches = cluster.mini_batch_size // cluster.training.micro_batch_size
    costs_a, costs_b = (_costs(model, cluster) for model in cluster.models)
    problem = fusion_problem(
        placement,
        (costs_a, costs_b),
        (micro_batches, micro_batches),
        p2p=_p2p(cluster, placement),
        memory=cluster.gpu.memory_gb,
    )
    # Refuses what no schedule can be made of: too many subtasks, times beyond all measure.
    return placement, parse_problem(problem_to_json(problem))


def _costs(model: ClusterModel, cluster: Cluster) -> StageCosts:
    if isinstance(model.source, StageCosts):
        return model.source
    return estimate_stages(model.source, model.parallelism, cluster.training, cluster.gpu)


def _p2p(cluster: Cluster, placement: Placement) -> float:
    """One time for both models, as a problem has it: the slower one's."""
    if cluster.p2p is not None:
        return cluster.p2p
    between_nodes = placement.spans_nodes(cluster.gpus_per_node)
    return max(
        p2p_milliseconds(
            model.source, model.parallelism.tp, cluster.training, cluster.gpu, between_nodes
        )
        for model in cluster.models
        if isinstance(model.source, TransformerShape)
    )
