"""From a model's raw output to one number per response token: what scoring and training share.

Outputs are read where a token is predicted (batches.py); all results are [batch, response]
float32, garbage outside the response.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlhfuse.models.logits import token_statistics
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
        return self._read(logits, batch, with_entropy=False)[0]

    def log_probs_and_entropy(self, logits: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """The same, and the entropy of the distribution each of them was drawn from, in nats."""
        log_probs, entropy = self._read(logits, batch, with_entropy=True)
        return log_probs, entropy

    def _read(self, logits: Tensor, batch: TokenBatch, with_entropy: bool) -> list[Tensor]:
        """A backward overwrites the logits: see `token_statistics`."""
        per_position = token_statistics(
            logits,
            batch.next_tokens(),
            self.vocab_size,
            self.temperature,
            self.tp_group,
            with_entropy=with_entropy,
        )
        return [batch.gather_response(each) for each in per_position if each is not None]


def response_values(output: Tensor, batch: TokenBatch) -> Tensor:
    """A critic's output [batch, sequence, 1]: its value before each response token."""
    return batch.gather_response(output.squeeze(-1).float())


def sequence_scores(output: Tensor, batch: TokenBatch) -> Tensor:
    """A reward model's output [batch, sequence, 1]: the scalar at each last token, [batch].

    As Hugging Face's sequence classification reads it.
    """
    return batch.gather_last(output.squeeze(-1).float())
