"""How much better than expected each response token was.

Everything here is data for the policy gradient, so nothing carries a gradient. Whitening and
group baselines need the whole rollout batch: gather it first, never call these per micro-batch.
Positions where mask is 0 are skipped in time: they hold no state, cost no discount, and are zero
in every result. After the last response token the episode is over and its value is zero, also
where the length budget ended it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlhfuse.rlhf.masking import masked, per_sample, token_count

ADVANTAGE_ESTIMATORS = ("gae", "grpo", "rloo", "reinforce++")

# Keeps a group whose scores are all equal at zero; far below the spread of any real scores.
_STD_EPSILON = 1e-6
# lm-human-preferences (the code of Ziegler et al. 2019) whitens with this; it guards var = 0.
_VARIANCE_EPSILON = 1e-8


@dataclass(frozen=True)
class Advantages:
    """What the losses need to know of a rollout batch.

    advantages: [batch, response] float32. returns: [batch, response] float32, the critic's
    regression target, or None from an estimator that has no critic. Both are zero outside the
    response.
    """

    advantages: Tensor
    returns: Tensor | None


def estimate_advantages(
    kind: str,
    token_rewards: Tensor,
    mask: Tensor,
    *,
    whiten_advantages: bool,
    values: Tensor | None = None,
    group_ids: Tensor | None = None,
    gamma: float = 1.0,
    lam: float = 1.0,
    normalize_std: bool = True,
) -> Advantages:
    """Runs one of ADVANTAGE_ESTIMATORS over a whole rollout batch.

    token_rewards, mask, values: [batch, response] float32; group_ids: [batch] int64, equal for
    samples of one prompt. gae needs values (and gamma, lam); grpo and rloo need group_ids and
    take the sum of a sample's rewards as its score, so a KL penalty in them counts;
    reinforce++ needs neither. normalize_std belongs to grpo (False: Dr. GRPO).
    whiten_advantages is for gae, grpo and rloo; reinforce++ always whitens.
    """
    returns: Tensor | None = None
    if kind == "gae":
        if values is None:
            raise ValueError("advantage estimator 'gae' needs values, [batch, response]")
        advantages, returns = gae(token_rewards, values, mask, gamma, lam)
    elif kind in ("grpo", "rloo"):
        if group_ids is None:
            raise ValueError(f"advantage estimator {kind!r} needs group_ids, [batch]")
        scores = masked(token_rewards, mask, "token_rewards").sum(dim=1)
        per_sample(group_ids, mask, "group_ids")
        per_score = (
            grpo(scores, group_ids, normalize_std) if kind == "grpo" else rloo(scores, group_ids)
        )
        advantages = masked(per_score.unsqueeze(1).expand_as(mask), mask, "advantages")
    elif kind == "reinforce++":
        advantages = reinforce_plus_plus(token_rewards, mask, gamma)
    else:
        raise ValueError(
            f"advantage estimator {kind!r} is unknown: "
            f"choose one of {', '.join(ADVANTAGE_ESTIMATORS)}"
        )
    if whiten_advantages and kind != "reinforce++":
        advantages = whiten(advantages, mask)
    return Advantages(advantages, returns)


@torch.no_grad()
def gae(
    token_rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: Schulman et al. 2016 (arXiv 1506.02438), equation 16.

      delta_t = r_t + gamma * V_{t+1} - V_t;  A_t = delta_t + gamma * lam * A_{t+1}

    token_rewards, values, mask: [batch, response]. Returns (advantages, returns), both
    [batch, response]; returns = advantages + values, the target of the critic.
    """
    token_rewards = masked(token_rewards, mask, "token_rewards")
    values = masked(values, mask, "values")
    advantages = torch.zeros_like(values)
    next_value = values.new_zeros(len(values))
    next_advantage = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = token_rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        is_token = mask[:, t] != 0
        next_value = torch.where(is_token, values[:, t], next_value)
        next_advantage = torch.where(is_token, advantage, next_advantage)
        advantages[:, t] = torch.where(is_token, advantage, 0.0)
    return advantages, advantages + values


@torch.no_grad()
def grpo(scores: Tensor, group_ids: Tensor, normalize_std: bool = True) -> Tensor:
    """Scores relative to their group: Shao et al. 2024 (arXiv 2402.03300), section 4.1.2.

    A_i = (r_i - mean(r)) / std(r) with the sample standard deviation (n - 1) of the group; without
    normalize_std A_i = r_i - mean(r), which is Dr. GRPO (Liu et al. 2025, arXiv 2503.20783).
    scores, group_ids: [batch]. Returns [batch], which sums to zero within each group.
    Raises ValueError if a group holds one sample only.
    """
    member, size = _groups(scores, group_ids)
    centred = _centre(scores, member, size)
    if normalize_std:
        variance = member.T @ centred.square() / (size - 1)
        centred = centred / (member @ variance.sqrt() + _STD_EPSILON)
    return centred.to(scores.dtype)


@torch.no_grad()
def rloo(scores: Tensor, group_ids: Tensor) -> Tensor:
    """REINFORCE leave-one-out: Ahmadian et al. 2024 (arXiv 2402.14740).

    A_i = r_i - mean of the scores of the others in its group = (r_i - mean(r)) * n / (n - 1).
    scores, group_ids: [batch]. Returns [batch], which sums to zero within each group.
    Raises ValueError if a group holds one sample only.
    """
    member, size = _groups(scores, group_ids)
    return (_centre(scores, member, size) * (member @ (size / (size - 1)))).to(scores.dtype)


@torch.no_grad()
def reinforce_plus_plus(token_rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """REINFORCE++: Hu 2025 (arXiv 2501.03262): discounted reward-to-go, whitened over the batch.

    G_t = r_t + gamma * G_{t+1};  A = whiten(G). token_rewards (with the KL penalty in them, k1 in
    the paper), mask: [batch, response]. Returns [batch, response].
    """
    # The reward-to-go is the advantage over a critic that always says zero.
    reward_to_go, _ = gae(token_rewards, torch.zeros_like(token_rewards), mask, gamma, 1.0)
    return whiten(reward_to_go, mask)


@torch.no_grad()
def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scales x to unit variance over all response tokens of the batch, and to zero mean.

    x, mask: [batch, response]. The variance is the population's (division by the token count).
    shift_mean=False puts the mean back, as is usual for rewards. Returns [batch, response], zero
    where mask is 0. Raises ValueError for a batch without response tokens.
    """
    # In float64, for the reason given at _centre.
    wide = masked(x, mask, "x").double()
    count = token_count(mask)
    mean = wide.sum() / count
    centred = masked(wide - mean, mask, "x")
    whitened = centred * torch.rsqrt(centred.square().sum() / count + _VARIANCE_EPSILON)
    if not shift_mean:
        whitened = masked(whitened + mean, mask, "x")
    return whitened.to(x.dtype)


def _groups(scores: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns membership, [batch, groups] float64 in {0, 1}, and group sizes, [groups]."""
    if scores.dim() != 1 or scores.shape != group_ids.shape:
        raise ValueError(
            f"scores have shape {tuple(scores.shape)} and group_ids {tuple(group_ids.shape)}: "
            "both must be [batch]"
        )
    ids = group_ids.unique()
    # A matrix product, not a scatter: sums in a fixed order on every device.
    member = (group_ids.unsqueeze(1) == ids).double()
    size = member.sum(dim=0)
    if (size < 2).any():
        raise ValueError(
            f"groups {ids[size < 2].tolist()} hold one sample each, and its own score cannot be "
            "its baseline: set --rollout-samples-per-prompt to 2 or more"
        )
    return member, size


def _centre(scores: Tensor, member: Tensor, size: Tensor) -> Tensor:
    """Returns scores minus their group's mean, [batch] float64.

    In float32 the mean of equal scores may be off by a rounding error, which the division by a
    standard deviation just as small would blow up into an advantage.
    """
    scores = scores.double()
    return scores - member @ (member.T @ scores / size)
