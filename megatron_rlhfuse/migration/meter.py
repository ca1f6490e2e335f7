"""Rates of this machine and these models, from what was observed while they ran.

Until something was observed an assumption stands for it: transfers at 1 GB/s and 2 ms each, and a
sample's inference as four prefills of it (actor, reference, critic, reward).
"""

from __future__ import annotations

from collections import deque

from megatron_rlhfuse.migration.rates import Rates, fit_decode

KEPT = 4000
"""Observations of decode steps: several iterations, and a bounded fit."""

FORGETTING = 0.5
"""An iteration weighs so much of the next one, where sums are kept."""

MODELS = 4
ASSUMED_BYTES_PER_S = 1e9
ASSUMED_LATENCY_S = 2e-3


class _Ratio:
    """Amount per time, exponentially forgotten."""

    def __init__(self) -> None:
        self.amount = self.seconds = 0.0

    def add(self, amount: float, seconds: float) -> None:
        if amount > 0 and seconds > 0:
            self.amount = FORGETTING * self.amount + amount
            self.seconds = FORGETTING * self.seconds + seconds

    def rate(self, assumed: float) -> float:
        return self.amount / self.seconds if self.seconds > 0 else assumed


class RateMeter:
    """Collects observations of all instances; on one rank."""

    def __init__(self, kv_bytes_per_token: float) -> None:
        self._kv_bytes_per_token = kv_bytes_per_token
        self._decode: deque[tuple[float, float]] = deque(maxlen=KEPT)
        self._prefill, self._near, self._far, self._inference = (_Ratio() for _ in range(4))

    def decode(self, batch: float, seconds: float) -> None:
        """A step of an instance, or the mean of several."""
        if batch > 0 and seconds > 0:
            self._decode.append((batch, seconds))

    def prefill(self, tokens: float, seconds: float) -> None:
        """Of an instance in an iteration."""
        self._prefill.add(tokens, seconds)

    def transfer(self, kv_bytes: float, seconds: float, same_node: bool) -> None:
        """Of an iteration."""
        (self._near if same_node else self._far).add(kv_bytes, seconds)

    def inference(self, samples: float, seconds: float) -> None:
        """Of an instance in an iteration."""
        self._inference.add(samples, seconds)

    def rates(self, mean_tokens: float) -> Rates | None:
        """None until a decode step was observed. mean_tokens: of a sample, prompt included."""
        decode = fit_decode(self._decode)
        if not decode:
            return None
        # A prompt costs no more than as many decode steps.
        prefill = self._prefill.rate(1.0 / decode[0][1])
        per_second = self._inference.rate(prefill / (MODELS * max(1.0, mean_tokens)))
        near = self._near.rate(ASSUMED_BYTES_PER_S)
        return Rates(
            decode=decode,
            prefill_tokens_per_s=prefill,
            kv_bytes_per_token=self._kv_bytes_per_token,
            kv_bytes_per_s=near,
            kv_bytes_per_s_between_nodes=self._far.rate(min(near, ASSUMED_BYTES_PER_S)),
            transfer_latency_s=ASSUMED_LATENCY_S,
            inference_s=1.0 / per_second,
        )
