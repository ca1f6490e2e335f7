"""From a model's raw output to one number per response token: what scoring and training share.

Outputs are read where a token is predicted (batches.py); all results are [batch, response]
float32, garbage outside the response.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlhfuse.models.logits import entropy, token_log_probs
from megatron_rlhfuse.training.batches import TokenBatch


@dataclass(frozen=True)
class PolicyHead:
    """Reads a policy's logits, [batch, sequence, vocabulary / TP]."""

    vocab_size: int
    temperature: float
    """The samples were drawn from softmax(logits / temperature): that is the policy."""
    tp_group: torch.distributed.ProcessGroup

    def log_probs(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        """Log-probabilities of the response tokens, [batch, response]."""
        per_position = token_log_probs(
            logits, batch.next_tokens(), self.vocab_size, self.temperature, self.tp_group
        )
        return batch.gather_response(per_position)

    def entropy(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        """Entropy of the distribution each response token was drawn from, in nats."""
        per_position = entropy(logits, self.vocab_size, self.temperature, self.tp_group)
        return batch.gather_response(per_position)


def response_values(output: Tensor, batch: TokenBatch) -> Tensor:
    """A critic's output [batch, sequence, 1]: its value before each response token."""
    return batch.gather_response(output.squeeze(-1).float())


def sequence_scores(output: Tensor, batch: TokenBatch) -> Tensor:
    """A reward model's output [batch, sequence, 1]: the scalar at each last token, [batch].

    As Hugging Face's sequence classification reads it.
    """
    return output.squeeze(-1).float().gather(1, batch.last_positions().unsqueeze(1)).squeeze(1)
