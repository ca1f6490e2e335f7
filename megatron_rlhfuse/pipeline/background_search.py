"""A search for a plan in a thread of rank 0, beside the training."""

from __future__ import annotations

import atexit
import json
import threading
import time
from typing import Any

import torch.distributed as dist

from megatron_rlhfuse.schedule.errors import ScheduleError
from megatron_rlhfuse.schedule.order import order_to_tokens
from megatron_rlhfuse.schedule.problem import Problem
from megatron_rlhfuse.schedule.search import Progress, StopSearch, search


class BackgroundSearch:
    """A search in a thread of rank 0; on other ranks nothing."""

    def __init__(self, problem: Problem, seconds: float, threads: int) -> None:
        self._stopped = threading.Event()
        self._found: dict[str, Any] = {"order": None, "seconds": 0.0}
        self._thread: threading.Thread | None = None
        if dist.get_rank() == 0:
            self._thread = threading.Thread(
                target=self._run, args=(problem, seconds, threads), name="plan search", daemon=True
            )
            self._thread.start()
            # A job may end first, and the interpreter must not end under the search's native code.
            atexit.register(self.stop)

    @property
    def is_done(self) -> bool:
        """Whether the result is there. For rank 0."""
        return self._thread is None or not self._thread.is_alive()

    def stop(self) -> None:
        """Ends the search, with the best plan so far as its result."""
        atexit.unregister(self.stop)
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(5)

    def result_text(self) -> str:
        """JSON with the order found, null for none, and the seconds that it took."""
        return json.dumps(self._found)

    def _run(self, problem: Problem, seconds: float, threads: int) -> None:
        def stop_if_told(progress: Progress) -> None:
            if self._stopped.is_set():
                raise StopSearch

        began = time.monotonic()
        try:
            result = search(
                problem,
                seconds=seconds,
                threads=threads,
                progress=stop_if_told,
            )
        except ScheduleError:  # no plan fits the memory: the one that runs stays
            return
        self._found = {
            "order": order_to_tokens(result.timeline.order),
            "seconds": time.monotonic() - began,
        }
