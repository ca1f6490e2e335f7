"""How a wrong flag is reported."""

from __future__ import annotations


class FlagError(ValueError):
    """A flag, or a combination of flags, that cannot run. One line: the flag and the remedy."""


def flag(attribute: str) -> str:
    """The flag of an argument: `rollout_batch_size` -> `--rollout-batch-size`."""
    return "--" + attribute.replace("_", "-")
