"""Generation instances on a GPU: memory given back, and weights that return."""

from __future__ import annotations

import pytest
import torch

from .conftest import MakeEngine, TinyModel, requests
from .test_engine import tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

KV_CACHE_BYTES = 1 << 30


def test_a_sleeping_engine_frees_memory_and_wakes_with_weights(
    make_engine: MakeEngine, tiny_model: TinyModel
) -> None:
    engine = make_engine(
        tiny_model,
        6,
        device="cuda",
        dtype="bfloat16",
        visible_devices=(0,),
        kv_cache_bytes=KV_CACHE_BYTES,
        block_size=None,
        enable_sleep=True,
    )
    engine.update_weights(tiny_model.weights(1).items(), 1)
    first = engine.generate(requests(8))
    free, _ = torch.cuda.mem_get_info()
    engine.sleep()
    assert torch.cuda.mem_get_info()[0] - free > KV_CACHE_BYTES // 2

    engine.wake()
    engine.update_weights(tiny_model.weights(2).items(), 2)
    second = engine.generate(requests(8))
    assert tokens(second) != tokens(first)

    # Without an update the kept version comes back.
    engine.sleep()
    engine.wake()
    assert tokens(engine.generate(requests(8))) == tokens(second)
    engine.update_weights(tiny_model.weights(1).items(), 1)
    assert tokens(engine.generate(requests(8))) == tokens(first)
