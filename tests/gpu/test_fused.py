"""The fused pipeline on GPUs with NCCL: the checks of tests/distributed, on what GPUs there are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs CUDA devices", allow_module_level=True)

from tests.distributed.conftest import run_on_ranks
from tests.distributed.fused_checks import CASES, Case, check_fused

# By the number of GPUs that they need; one rank shows the executor, clock and meter on CUDA.
CASES_BY_GPUS: dict[int, dict[str, Case]] = {
    1: {"PP1": ((1, 1), (1, 1), (3, 2), {})},
    2: {
        "PP2, critic PP2": ((1, 2), (1, 2), (4, 3), {}),
        "PP2, critic PP1 DP2": ((1, 2), (1, 1), (2, 4), {"actor": "qwen2"}),
    },
    4: CASES,
}
# Kernels whose sums depend on timing would differ between two runs of one schedule, too.
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}


@pytest.mark.gpu
@pytest.mark.parametrize("gpus", CASES_BY_GPUS)
def test_losses_and_gradients_equal_the_stock_schedule(gpus: int, tmp_path: Any) -> None:
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} CUDA device(s), {torch.cuda.device_count()} here")
    cases = CASES_BY_GPUS[gpus]
    results = run_on_ranks(
        check_fused, gpus, str(tmp_path), list(cases), cases, timeout=600, env=DETERMINISTIC
    )
    for rank, found in enumerate(results):
        for name in cases:
            assert found[name]["wrong"] == [], f"{name}, rank {rank}"
            assert found[name]["forward"] and found[name]["smallest"] > 0, f"{name}, rank {rank}"
