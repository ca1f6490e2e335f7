"""From an order of subtasks to what a rank executes: compute, send, receive, wait, free.

`lower` adds to a compute-only order all that its transfers need; `replay.prove` shows that the
result ends, whatever the transport blocks on.

Invariants of a program that `lower` returns:
- its FORWARD and BACKWARD are the order's, in the order's sequence;
- every message between two devices has one SEND and, on the receiver, one POST and after it one
  WAIT, right before the subtask that uses it; the messages of a channel (a model, a pipeline, a
  direction, two stages) are sent, posted and waited for by micro-batch, ascending: NCCL matches
  messages by sequence, not by tag;
- a receive is posted ahead of its WAIT: `ahead` messages early, or earlier where a blocking
  send needs it;
- an output is freed (FREE) after its SEND. RELEASE ends a SEND where it cannot hold the device up:
  once something has come that the receiver sent after it had taken the message, else at the end;
- replayed with sends that block until their receive is posted, it ends (replay.py).

Each micro-batch must go through a stage in ascending order, forward and backward: gradients would
be added up in another order otherwise, and the last bits of the weights would depend on the plan.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rlhfuse.schedule.errors import OrderError, ScheduleError
from megatron_rlhfuse.schedule.evaluate import evaluate
from megatron_rlhfuse.schedule.order import Order, Subtask, order_to_tokens
from megatron_rlhfuse.schedule.problem import Problem
from megatron_rlhfuse.schedule.program import Instruction, Message, Op, Program, message_of
from megatron_rlhfuse.schedule.replay import Replay


def lower(problem: Problem, order: Sequence[Sequence[Subtask]], ahead: int = 2) -> list[Program]:
    """The programs of all devices; F only, or F and B.

    Args:
        order: as `parse_order` accepts it, or its forwards alone
        ahead: receives of a channel that are posted before the first of them is waited for

    Raises OrderError with the place: for a circle of waiting subtasks, for micro-batches out of
    sequence. Raises ScheduleError for what Megatron's backward step cannot run: a split backward,
    a pipeline that passes a device twice.
    """
    if ahead < 1:
        raise ScheduleError(f"ahead: want at least one receive posted ahead, got {ahead}")
    _check_runnable(problem)
    rows = [list(row) for row in order]
    _check_sequence(rows)
    _check_executable(problem, rows)
    programs = [_program(problem, row, ahead) for row in rows]
    programs = [_with_releases(device, programs) for device in range(len(programs))]
    replay = Replay(programs)
    while not replay.run():
        replay.post_for_blocked_sends()
    return replay.programs


def forward_only(order: Sequence[Sequence[Subtask]]) -> Order:
    """The forwards of an order; they can be executed wherever the whole order can."""
    return [[subtask for subtask in row if subtask.kind == "F"] for row in order]


def _check_runnable(problem: Problem) -> None:
    for m, model in enumerate(problem.models):
        if model.weight_gradient is not None:
            raise ScheduleError(
                f"models[{m}].weight_gradient: Megatron's backward step is one piece; plan without "
                "a split backward to train with the plan"
            )
        for k, pipeline in enumerate(model.pipelines):
            if len(set(pipeline)) < len(pipeline):
                raise ScheduleError(
                    f"models[{m}].pipelines[{k}]: passes a device twice; interleaved stages can be "
                    "planned, not trained"
                )


def _check_sequence(order: Order) -> None:
    for device, row in enumerate(order):
        last: dict[tuple[int, int, str], int] = {}
        for position, subtask in enumerate(row):
            stream = (subtask.model, subtask.pipeline, subtask.kind)
            before = last.get(stream, -1)
            if subtask.micro_batch != before + 1:
                wanted = subtask._replace(micro_batch=before + 1).token
                raise OrderError(
                    order_to_tokens(order),
                    device,
                    position,
                    f"micro-batches must stay in sequence, here {wanted}: gradients are added up "
                    "in this sequence",
                )
            last[stream] = subtask.micro_batch


def _check_executable(problem: Problem, order: Order) -> None:
    evaluate(problem, order)


def _program(problem: Problem, row: Sequence[Subtask], ahead: int) -> Program:
    """A device's program, without RELEASE."""
    incoming: dict[tuple[int, int, str], list[Instruction]] = {}
    for subtask in row:
        source = _source(problem, subtask)
        if source >= 0:
            post = Instruction(Op.POST, *_message(subtask), peer=source)
            incoming.setdefault((subtask.model, subtask.pipeline, subtask.kind), []).append(post)
    # All first receives before anything else, in turn: none waits for another channel's.
    program = [posts[i] for i in range(ahead) for posts in incoming.values() if i < len(posts)]
    for subtask in row:
        model, pipeline, kind, micro_batch, _ = subtask
        posts = incoming.get((model, pipeline, kind))
        if posts:
            program.append(posts[micro_batch]._replace(op=Op.WAIT))
            program += posts[micro_batch + ahead : micro_batch + ahead + 1]
        op = Op.FORWARD if kind == "F" else Op.BACKWARD
        program.append(Instruction(op, *_message(subtask)))
        target = _target(problem, subtask)
        if target >= 0:
            program.append(Instruction(Op.SEND, *_message(subtask), peer=target))
            if kind == "F":
                program.append(Instruction(Op.FREE, *_message(subtask)))
    return program


def _with_releases(device: int, programs: Sequence[Program]) -> Program:
    """The device's program with a RELEASE for every SEND."""
    sends = {message_of(device, i): i for i in programs[device] if i.op is Op.SEND}
    # What a peer takes, in its order, and how much of that it had taken when it sent a message.
    taken: dict[int, list[Instruction]] = {}
    taken_before: dict[Message, int] = {}
    for peer in {send.peer for send in sends.values()}:
        taken[peer] = []
        for instruction in programs[peer]:
            if instruction.peer == device and instruction.op is Op.WAIT:
                taken[peer].append(sends[message_of(peer, instruction)]._replace(op=Op.RELEASE))
            elif instruction.peer == device and instruction.op is Op.SEND:
                taken_before[message_of(peer, instruction)] = len(taken[peer])
    program: Program = []
    released = dict.fromkeys(taken, 0)
    for instruction in programs[device]:
        program.append(instruction)
        peer = instruction.peer
        if instruction.op is Op.WAIT and peer in taken:
            arrived = max(released[peer], taken_before[message_of(device, instruction)])
            program += taken[peer][released[peer] : arrived]
            released[peer] = arrived
    for peer, releases in taken.items():
        program += releases[released[peer] :]
    return program


def _message(subtask: Subtask) -> tuple[int, int, str, int, int]:
    return subtask.model, subtask.pipeline, subtask.kind, subtask.micro_batch, subtask.stage


def _source(problem: Problem, subtask: Subtask) -> int:
    """The device a subtask's input comes from, -1 where it needs none."""
    before = subtask.stage - 1 if subtask.kind == "F" else subtask.stage + 1
    return _device(problem, subtask, before)


def _target(problem: Problem, subtask: Subtask) -> int:
    """The device a subtask's result goes to, -1 where it goes nowhere."""
    after = subtask.stage + 1 if subtask.kind == "F" else subtask.stage - 1
    return _device(problem, subtask, after)


def _device(problem: Problem, subtask: Subtask, stage: int) -> int:
    pipeline = problem.models[subtask.model].pipelines[subtask.pipeline]
    return pipeline[stage] if 0 <= stage < len(pipeline) else -1
