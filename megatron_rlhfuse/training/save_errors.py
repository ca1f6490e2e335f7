"""What went wrong while Megatron saved a checkpoint.

Its writer logs the error, and raises another one that names only the error's class.
"""

from __future__ import annotations

import logging
from types import TracebackType

_WRITER = "megatron.core.dist_checkpointing"


class SaveErrors(logging.Handler):
    """Takes down the first error that the writer logs while the block runs."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.first: str | None = None

    def describe(self, fault: BaseException) -> str:
        """What this rank knows; of other ranks no more than the exception that was raised says."""
        from torch.distributed.checkpoint import CheckpointException

        if self.first is not None:
            return self.first
        if isinstance(fault, CheckpointException):
            failures = [f"rank {rank}: {error}" for rank, (error, _) in fault.failures.items()]
            return "; ".join(failures) or "another rank failed"
        return str(fault)

    def emit(self, record: logging.LogRecord) -> None:
        self.first = self.first or record.getMessage()

    def __enter__(self) -> SaveErrors:
        logging.getLogger(_WRITER).addHandler(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        logging.getLogger(_WRITER).removeHandler(self)
