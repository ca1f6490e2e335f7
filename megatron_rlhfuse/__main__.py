"""`python -m megatron_rlhfuse` is the `rlhfuse` command."""

from __future__ import annotations

import sys

from megatron_rlhfuse.cli import main

if __name__ == "__main__":
    sys.exit(main())
