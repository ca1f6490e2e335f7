"""What a step is measured by: clocks, the bytes that autograd keeps, and costs of stages."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from megatron_rlhfuse import platform
from megatron_rlhfuse.pipeline.clock import Span, make_clock
from megatron_rlhfuse.pipeline.devices import map_devices, opposite_layout
from megatron_rlhfuse.pipeline.groups import Layout
from megatron_rlhfuse.pipeline.memory import ActivationMeter
from megatron_rlhfuse.pipeline.profile import (
    StageCost,
    gather_costs,
    make_problem,
    median_costs,
    step_costs,
)
from megatron_rlhfuse.schedule.program import Instruction, Op

FLOAT = 4  # bytes


def instruction(op: Op, model: int = 0, micro_batch: int = 0) -> Instruction:
    return Instruction(op, model, 0, "F" if op is Op.FORWARD else "B", micro_batch, 0)


# ---------------------------------------------------------------- activation memory


@pytest.fixture
def no_garbage_collector() -> Iterator[None]:
    """What only the collector frees is a leak: activations would pile up in between."""
    gc.disable()
    yield
    gc.enable()


def test_a_linear_layer_and_an_activation_keep_their_inputs() -> None:
    linear = torch.nn.Linear(3, 5)
    meter = ActivationMeter(linear.parameters())
    with meter:
        output = torch.nn.functional.gelu(linear(torch.ones(2, 3)))
    assert meter.held == meter.peak == (2 * 3 + 2 * 5) * FLOAT
    output.sum().backward()
    assert meter.held == 0
    assert meter.peak == (2 * 3 + 2 * 5) * FLOAT
    assert linear.weight.grad is not None


def test_tensors_of_one_storage_count_once_and_by_its_whole_size() -> None:
    base = torch.ones(8, 2, requires_grad=True)
    meter = ActivationMeter([])
    with meter:
        double = base * 2  # keeps a number, no tensor
        kept = [double[:4].sin(), double[4:].sin(), double.t().cos()]
    assert meter.held == 16 * FLOAT
    del kept[1]
    assert meter.held == 16 * FLOAT
    kept.clear()
    assert meter.held == 0


@pytest.mark.parametrize("name", ["exp", "sigmoid", "tanh", "softmax"])
def test_an_output_that_its_own_operation_keeps_does_not_leak(
    no_garbage_collector: None, name: str
) -> None:
    meter = ActivationMeter([])
    inputs = torch.ones(7, requires_grad=True)
    with meter:
        output = inputs.softmax(0) if name == "softmax" else getattr(inputs, name)()
    assert meter.held == 7 * FLOAT
    del output
    assert meter.held == 0


def test_nothing_is_kept_where_no_backward_will_come() -> None:
    linear = torch.nn.Linear(3, 5)
    meter = ActivationMeter(linear.parameters())
    with meter, torch.no_grad():
        linear(torch.ones(2, 3)).exp()
    assert meter.held == meter.peak == 0


def test_the_peak_is_that_of_what_is_held_at_once() -> None:
    meter = ActivationMeter([])
    inputs = torch.ones(10, requires_grad=True)
    for _ in range(3):
        with meter:
            first, second = inputs.sin(), (inputs * 2).sin()
        del first, second
    assert (meter.held, meter.peak) == (0, 20 * FLOAT)


def test_on_a_gpu_the_allocator_is_asked_and_nothing_is_hooked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allocated = [1000]
    monkeypatch.setattr(platform, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocated[0])
    parameter = torch.nn.Parameter(torch.ones(4))
    meter = ActivationMeter([parameter])
    with meter:
        output = parameter.square()
        allocated[0] = 1300
        assert meter.held == 300
    allocated[0] = 1100
    # A hooked one would be another tensor: Megatron marks the parameter itself in the backward.
    assert output.grad_fn is not None and output.grad_fn._saved_self is parameter  # type: ignore[attr-defined]
    assert (meter.held, meter.peak) == (100, 300)


def test_metered_gradients_are_the_same_bits() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.GELU(), torch.nn.Softmax(-1))
    inputs = torch.randn(3, 6)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(inputs).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    with ActivationMeter(model.parameters()):
        metered = gradients()
    assert len(plain) == 2
    assert all(map(torch.equal, plain, metered))


# ---------------------------------------------------------------- clocks


def test_spans_come_in_order_and_none_overlaps() -> None:
    before = time.time()
    clock = make_clock()
    for micro_batch in range(4):
        clock.start()
        time.sleep(0.002)
        clock.stop(instruction(Op.FORWARD, micro_batch=micro_batch))
    spans = clock.spans()
    assert [span.instruction.micro_batch for span in spans] == [0, 1, 2, 3]
    assert all(0 <= span.start < span.end for span in spans)
    assert all(span.end - span.start >= 0.002 for span in spans)
    assert all(one.end <= other.start for one, other in pairwise(spans))
    assert before <= clock.began <= clock.began + spans[-1].end <= time.time() + 1e-3


class Event:
    """Stands for torch.cuda.Event; each is recorded 250 ms after the one before."""

    count = 0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = 250.0 * Event.count
        Event.count += 1

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


def test_on_a_gpu_spans_are_seconds_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    monkeypatch.setattr(platform, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    clock = make_clock()
    for op in (Op.FORWARD, Op.BACKWARD):
        clock.start()
        clock.stop(instruction(op))
    assert clock.spans() == [
        Span(instruction(Op.FORWARD), 0.25, 0.5),
        Span(instruction(Op.BACKWARD), 0.75, 1.0),
    ]
    assert waited


# ---------------------------------------------------------------- costs


def test_costs_of_a_step_are_means_per_model_and_kind() -> None:
    spans = [
        Span(instruction(Op.FORWARD, 0, 0), 0.0, 1.0),
        Span(instruction(Op.FORWARD, 1, 0), 1.0, 1.5),
        Span(instruction(Op.FORWARD, 0, 1), 2.0, 5.0),
        Span(instruction(Op.BACKWARD, 0, 0), 5.0, 9.0),
        Span(instruction(Op.BACKWARD, 0, 1), 9.0, 11.0),
        Span(instruction(Op.BACKWARD, 1, 0), 11.0, 18.0),
    ]
    assert step_costs(spans, 2, [30, 40]) == (StageCost(2.0, 3.0, 30.0), StageCost(0.5, 7.0, 40.0))


def test_of_several_steps_times_are_medians_and_memory_the_most() -> None:
    steps = [
        (StageCost(1.0, 9.0, 7.0),),
        (StageCost(100.0, 8.0, 0.0),),
        (StageCost(2.0, 1.0, 0.0),),
    ]
    assert median_costs(steps) == (StageCost(2.0, 8.0, 7.0),)


def test_gathered_costs_stand_at_the_stages_of_their_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Actor PP2 DP2 on ranks (0, 2) and (1, 3); the critic the other way.
    actor = Layout.contiguous(4, 1, 2)
    devices = map_devices(("actor", "critic"), [actor, opposite_layout(actor, 1, 2)])
    rows = [
        torch.tensor([0.1 * r, r, 10 + r, 100 + r, 20 + r, 30 + r, 200 + r], dtype=torch.float64)
        for r in range(4)
    ]

    def all_gather(tensors: list[torch.Tensor], mine: torch.Tensor, group: None) -> None:
        assert torch.equal(mine, rows[2])
        for tensor, row in zip(tensors, rows, strict=True):
            tensor.copy_(row)

    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "all_gather", all_gather)
    mine = (StageCost(2.0, 12.0, 102.0), StageCost(22.0, 32.0, 202.0))
    costs, transfer = gather_costs(devices, mine, 0.2)
    assert costs == [
        [StageCost(0.5, 10.5, 101.0), StageCost(2.5, 12.5, 103.0)],
        [StageCost(22.5, 32.5, 203.0), StageCost(20.5, 30.5, 201.0)],
    ]
    assert math.isclose(transfer, 0.3)
    problem = make_problem(devices, (4, 2), costs, transfer, 500.0)
    assert problem.devices == 2 and problem.memory_limit == (500.0, 500.0)
    assert [m.pipelines for m in problem.models] == [((0, 1),), ((1, 0),)]
    assert problem.models[1].backward == (32.5, 30.5)
