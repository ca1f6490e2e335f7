"""The ranks' part of rollout.py: a job that generates and scores, and does not train."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megatron_rlhfuse.arguments import parse_arguments


def main() -> None:
    target, compared = Path(sys.argv.pop(1)), sys.argv.pop(1)
    args = parse_arguments()
    import torch.distributed as dist
    from rollout_sides import COMPARISONS

    from megatron_rlhfuse.trainer import Trainer

    with Trainer(args) as trainer:
        result = COMPARISONS[compared](trainer)
        if dist.get_rank() == 0:
            target.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
