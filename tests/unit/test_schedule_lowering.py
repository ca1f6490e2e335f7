"""From an order to programs: what a program promises, and that none stands still for ever."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlhfuse.schedule.baselines import one_f_one_b
from megatron_rlhfuse.schedule.errors import LoweringError, OrderError, ScheduleError
from megatron_rlhfuse.schedule.evaluate import evaluate
from megatron_rlhfuse.schedule.lowering import forward_only, lower
from megatron_rlhfuse.schedule.order import Order, parse_order
from megatron_rlhfuse.schedule.problem import Model, Problem, load_problem
from megatron_rlhfuse.schedule.program import Instruction, Op, Program, message_of
from megatron_rlhfuse.schedule.replay import prove
from megatron_rlhfuse.schedule.search import greedy
from tests.unit.schedule_strategies import orders_in_sequence, problems

EXAMPLES = Path(__file__).parents[2] / "examples" / "problems"
COMPUTE = {"F": Op.FORWARD, "B": Op.BACKWARD}
SEEDS = st.integers(0, 2**32 - 1)


class Case(NamedTuple):
    """What was lowered, and what came of it."""

    problem: Problem
    order: Order
    ahead: int
    programs: list[Program]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any problem that can be trained; a planned or a random order of it, or its forwards alone."""
    problem = draw(problems(max_micro_batches=6, repeat_devices=False, split_backward=False))
    planner = draw(st.sampled_from(["greedy", "1F1B", "random", "random"]))
    if planner == "greedy":
        order = greedy(problem).order
    elif planner == "1F1B":
        order = one_f_one_b(problem)
    else:
        order = draw(orders_in_sequence(problem))
    if draw(st.booleans()):
        order = forward_only(order)
    ahead = draw(st.integers(1, 4))
    return Case(problem, order, ahead, lower(problem, order, ahead))


class Message(NamedTuple):
    """A transfer; counted along a channel by its micro-batch."""

    sender: int
    receiver: int
    model: int
    pipeline: int
    kind: str
    micro_batch: int


def message(device: int, each: Instruction) -> Message:
    """What an instruction of a device sends or receives."""
    sends = each.op in (Op.SEND, Op.RELEASE)
    ends = (device, each.peer) if sends else (each.peer, device)
    return Message(*ends, each.model, each.pipeline, each.kind, each.micro_batch)


def messages(problem: Problem, kinds: str) -> Iterator[Message]:
    """Every transfer of a problem, from its pipelines."""
    for m, model in enumerate(problem.models):
        for k, devices in enumerate(model.pipelines):
            for kind, path in (("F", devices), ("B", devices[::-1])):
                for sender, receiver in pairwise(path):
                    for micro_batch in range(model.micro_batches):
                        if kind in kinds:
                            yield Message(sender, receiver, m, k, kind, micro_batch)


def kinds_of(order: Order) -> str:
    return "FB" if any(each.kind == "B" for row in order for each in row) else "F"


def listed(programs: Sequence[Program], op: Op) -> Iterator[tuple[int, int, Instruction]]:
    """Device, position and instruction of every instruction with `op`."""
    for device, program in enumerate(programs):
        for position, each in enumerate(program):
            if each.op is op:
                yield device, position, each


def places(programs: Sequence[Program], op: Op) -> dict[Message, int]:
    """Where every message's instruction with `op` stands on its device."""
    return {message(device, each): position for device, position, each in listed(programs, op)}


def compute_places(programs: Sequence[Program]) -> dict[tuple[int, str, int], int]:
    """(device, token, stage) -> position of a subtask."""
    return {
        (device, each.token, each.stage): position
        for op in COMPUTE.values()
        for device, position, each in listed(programs, op)
    }


def run(
    programs: Sequence[Program],
    transport: str,
    seed: int,
    lanes: int = 1,
    tied: Set[int] = frozenset(),
    crossed: Set[int] = frozenset(),
) -> list[tuple[int, int]]:
    """Device and position of every rank that stands still for ever, in a random interleaving.

    Args:
        transport: "buffered", in which no send blocks; "posted", in which SEND blocks until its
            receive is posted; "taken", in which RELEASE blocks until its receiver has waited
        lanes: ranks of a device
        tied: models whose subtasks all ranks of a device begin together, as collectives make them
        crossed: models whose messages go from the first rank of a device to the last of another;
            of other models a rank talks with its like
    """
    rng = Random(seed)
    at = {(device, lane): 0 for device in range(len(programs)) for lane in range(lanes)}
    done: set[tuple[Op, int, Message]] = set()  # the lane is the sender's
    needs = {Op.WAIT: [Op.POST, Op.SEND]}
    if transport == "posted":
        needs[Op.SEND] = [Op.POST]
    if transport == "taken":
        needs[Op.RELEASE] = [Op.WAIT]

    def sent_by(lane: int, each: Instruction) -> int:
        receives = each.op in (Op.POST, Op.WAIT)
        return lanes - 1 - lane if receives and each.model in crossed else lane

    def ready(device: int, lane: int) -> bool:
        here = at[device, lane]
        if here == len(programs[device]):
            return False
        each = programs[device][here]
        if each.op in COMPUTE.values():
            others = [at[device, other] for other in range(lanes)]
            return each.model not in tied or min(others) >= here
        end = (sent_by(lane, each), message(device, each))
        return all((op, *end) in done for op in needs.get(each.op, []))

    while runnable := [rank for rank in at if ready(*rank)]:
        device, lane = rank = rng.choice(runnable)
        for _ in range(rng.choice([1, 2, 100])):
            if not ready(device, lane):
                break
            each = programs[device][at[rank]]
            if each.peer >= 0:
                done.add((each.op, sent_by(lane, each), message(device, each)))
            at[rank] += 1
    return [(d, position) for (d, _), position in at.items() if position < len(programs[d])]


def model(pipelines: tuple[tuple[int, ...], ...], micro_batches: int = 2, **fields: Any) -> Model:
    """Forward 1, backward 2, activation 1 on every stage."""
    stages = len(pipelines[0])
    values = {"forward": 1.0, "backward": 2.0, "activation": 1.0, **fields}
    per_stage = {name: (value,) * stages for name, value in values.items()}
    return Model(name="", micro_batches=micro_batches, pipelines=pipelines, **per_stage)


def ordered(problem: Problem, *rows: str) -> Order:
    return parse_order(problem, [row.split() for row in rows])


ONE_WAY = Problem(2, (model(((0, 1),)),))
ONE_WAY_ORDER = ordered(ONE_WAY, "a0F0 a0F1 a0B0 a0B1", "a0F0 a0B0 a0F1 a0B1")
BOTH_WAYS = Problem(2, (model(((0, 1),)), model(((1, 0),))))


# What a program holds


@given(cases())
def test_compute_is_the_order(case: Case) -> None:
    for row, program in zip(case.order, case.programs, strict=True):
        computed = [each for each in program if each.op in COMPUTE.values()]
        assert [each[1:6] for each in computed] == [tuple(subtask) for subtask in row]
        assert [each.op for each in computed] == [COMPUTE[subtask.kind] for subtask in row]
        assert all(each.peer == -1 for each in computed)


@given(cases())
def test_every_message_is_sent_posted_waited_for_and_released_once(case: Case) -> None:
    expected = Counter(messages(case.problem, kinds_of(case.order)))
    for op in (Op.SEND, Op.POST, Op.WAIT, Op.RELEASE):
        found = listed(case.programs, op)
        assert Counter(message(device, each) for device, _, each in found) == expected


@given(cases())
def test_the_stage_of_an_instruction_stands_on_its_device(case: Case) -> None:
    for device, program in enumerate(case.programs):
        for each in program:
            pipeline = case.problem.models[each.model].pipelines[each.pipeline]
            assert pipeline[each.stage] == device


@given(cases())
def test_a_wait_stands_right_before_its_subtask(case: Case) -> None:
    """Between them receives begin and sends that are done end: nothing that takes time."""
    for device, position, each in listed(case.programs, Op.WAIT):
        later = case.programs[device][position + 1 :]
        following = next(other for other in later if other.op not in (Op.POST, Op.RELEASE))
        assert following == each._replace(op=COMPUTE[each.kind], peer=-1)


@given(cases())
def test_a_send_stands_right_after_its_subtask(case: Case) -> None:
    for device, position, each in listed(case.programs, Op.SEND):
        earlier = reversed(case.programs[device][:position])
        before = next(other for other in earlier if other.op is not Op.POST)
        assert before == each._replace(op=COMPUTE[each.kind], peer=-1)


@given(cases())
def test_a_channel_goes_by_micro_batch_at_both_ends(case: Case) -> None:
    for op in (Op.SEND, Op.POST, Op.WAIT, Op.RELEASE):
        channels: dict[tuple[int | str, ...], list[int]] = {}
        for device, _, each in listed(case.programs, op):
            *channel, micro_batch = message(device, each)
            channels.setdefault(tuple(channel), []).append(micro_batch)
        for (_, _, m, *_), micro_batches in channels.items():
            assert micro_batches == list(range(case.problem.models[int(m)].micro_batches))


@given(cases())
def test_a_receive_is_posted_ahead_of_its_wait(case: Case) -> None:
    """At the latest before the subtask `ahead` messages earlier, the first ones before any."""
    computed = compute_places(case.programs)
    stages = {message(device, each): each for device, _, each in listed(case.programs, Op.WAIT)}
    for each, position in places(case.programs, Op.POST).items():
        if each.micro_batch < case.ahead:
            limit = min(
                place for (device, *_), place in computed.items() if device == each.receiver
            )
        else:
            earlier = stages[each._replace(micro_batch=each.micro_batch - case.ahead)]
            limit = computed[each.receiver, earlier.token, earlier.stage]
        assert position < limit


def as_late_as_allowed(program: Program, ahead: int) -> Program:
    """The program with each receive posted right before the subtask `ahead` messages earlier."""
    waits = [each for each in program if each.op is Op.WAIT]
    channels = list(dict.fromkeys((each.model, each.pipeline, each.kind) for each in waits))
    posts = {
        (each.model, each.pipeline, each.kind, each.micro_batch): each
        for each in program
        if each.op is Op.POST
    }
    first = [(*channel, i) for i in range(ahead) for channel in channels]
    late = [posts[key] for key in first if key in posts]
    due: list[Instruction] = []
    for each in program:
        if each.op in COMPUTE.values():
            late += due
            due = []
        if each.op is not Op.POST:
            late.append(each)
        if each.op is Op.WAIT:
            key = (each.model, each.pipeline, each.kind, each.micro_batch + ahead)
            due = [posts[key]] if key in posts else []
    return late


@given(cases(), SEEDS)
def test_a_receive_is_posted_earlier_only_where_a_blocking_send_needs_it(
    case: Case, seed: int
) -> None:
    late = [as_late_as_allowed(program, case.ahead) for program in case.programs]
    assert (case.programs == late) == (not run(late, "posted", seed))


@given(cases())
def test_an_output_is_freed_right_after_its_send(case: Case) -> None:
    freed = 0
    for device, position, each in listed(case.programs, Op.SEND):
        if each.kind == "F":
            after = case.programs[device][position + 1]
            assert after == each._replace(op=Op.FREE, peer=-1)
            freed += 1
    assert freed == len(list(listed(case.programs, Op.FREE)))


@given(cases())
def test_a_send_is_released_as_soon_as_its_receiver_must_have_taken_it(case: Case) -> None:
    """Behind the first WAIT for what the receiver sent after its own WAIT, or at the end."""
    sends, waits = places(case.programs, Op.SEND), places(case.programs, Op.WAIT)
    computed = compute_places(case.programs)
    for each, position in places(case.programs, Op.RELEASE).items():
        assert sends[each] < position
        mine = sorted(place for (device, *_), place in computed.items() if device == each.sender)
        replies = [
            waits[other]
            for other, sent in sends.items()
            if (other.sender, other.receiver) == (each.receiver, each.sender) and sent > waits[each]
        ]
        if replies:
            assert min(replies) < position < min(p for p in mine if p > min(replies))
        else:
            assert mine[-1] < position


@given(cases())
def test_nothing_but_its_input_holds_up_a_subtask(case: Case) -> None:
    """Every subtask starts when the timeline says, though RELEASE waits until a receiver waited."""
    problem, order, _, programs = case
    at, now = [0] * len(programs), [0.0] * len(programs)
    starts: list[list[float]] = [[] for _ in programs]
    arrived: dict[Message, float] = {}
    taken: dict[Message, float] = {}
    moved = True
    while moved:
        moved = False
        for device, program in enumerate(programs):
            while at[device] < len(program):
                each = program[at[device]]
                if each.op in (Op.WAIT, Op.RELEASE):
                    ends = arrived if each.op is Op.WAIT else taken
                    if message(device, each) not in ends:
                        break
                    now[device] = max(now[device], ends[message(device, each)])
                if each.op is Op.WAIT:
                    taken[message(device, each)] = now[device]
                elif each.op is Op.SEND:
                    arrived[message(device, each)] = now[device] + problem.p2p
                elif each.op in COMPUTE.values():
                    starts[device].append(now[device])
                    now[device] += problem.models[each.model].duration(each.kind, each.stage)
                at[device] += 1
                moved = True
    for mine, reference in zip(starts, evaluate(problem, order).start, strict=True):
        assert mine == pytest.approx(reference)


# Freedom from deadlock


@given(cases())
def test_what_was_lowered_is_proved(case: Case) -> None:
    prove(case.programs)


@given(cases(), SEEDS)
@pytest.mark.parametrize("transport", ["buffered", "posted", "taken"])
def test_every_interleaving_ends(transport: str, case: Case, seed: int) -> None:
    assert run(case.programs, transport, seed) == []


@given(cases(), SEEDS, st.sets(st.integers(0, 2)), st.sets(st.integers(0, 2)))
@pytest.mark.parametrize("transport", ["buffered", "posted", "taken"])
def test_every_interleaving_of_ranks_tied_by_collectives_ends(
    transport: str, case: Case, seed: int, tied: set[int], crossed: set[int]
) -> None:
    assert run(case.programs, transport, seed, 2, tied, crossed) == []


@pytest.mark.parametrize("ahead", [1, 2, 3, 4])
def test_receives_are_moved_where_both_ends_send_first(ahead: int) -> None:
    """Each device has a send more to go than the other has posted when it begins to send."""
    count = ahead + 1
    problem = Problem(2, (model(((0, 1),), count), model(((1, 0),), count)))
    forwards = [" ".join(f"{letter}0F{i}" for i in range(count)) for letter in "ab"]
    backwards = [" ".join(f"{letter}0B{i}" for i in range(count)) for letter in "ab"]
    order = ordered(
        problem,
        " ".join([forwards[0], forwards[1], backwards[1], backwards[0]]),
        " ".join([forwards[1], forwards[0], backwards[0], backwards[1]]),
    )
    programs = lower(problem, order, ahead)
    prove(programs)
    late = [as_late_as_allowed(program, ahead) for program in programs]
    with pytest.raises(LoweringError, match="a deadlock") as caught:
        prove(late)
    stands = late[caught.value.device][caught.value.position]
    assert (stands.op, stands.micro_batch) == (Op.SEND, ahead)
    moved = [device for device in range(2) if programs[device] != late[device]]
    assert moved
    posts, sends = places(programs, Op.POST), places(programs, Op.SEND)
    for device in moved:
        needed = Message(1 - device, device, 1 - device, 0, "F", ahead)
        blocked = Message(device, 1 - device, device, 0, "F", ahead)
        assert posts[needed] < sends[blocked]


@pytest.mark.parametrize("number", range(12))
def test_published_instances_are_lowered(number: int) -> None:
    problem = load_problem(EXAMPLES / f"published-{number:02}.json")
    for order in (greedy(problem).order, one_f_one_b(problem)):
        for each in (order, forward_only(order)):
            prove(lower(problem, each))


@given(cases())
def test_the_forwards_alone_keep_their_sequence(case: Case) -> None:
    alone = forward_only(case.order)
    assert alone == [[each for each in row if each.kind != "B"] for row in case.order]
    prove(lower(case.problem, alone, case.ahead))


# What the proof refuses


@st.composite
def with_messages(draw: st.DrawFn) -> Case:
    """A case with a pipeline of several stages, so that there is something to spoil."""
    return draw(cases().filter(lambda case: any(places(case.programs, Op.SEND))))


def refused(programs: Sequence[Program]) -> LoweringError:
    with pytest.raises(LoweringError) as caught:
        prove(programs)
    error = caught.value
    assert str(error).startswith(f"device {error.device}, position {error.position}: ")
    return error


@given(with_messages(), st.data())
def test_a_missing_instruction_is_refused(case: Case, data: st.DataObject) -> None:
    """At either end: where the message's partner stands, or the next one of its sequence."""
    op = data.draw(st.sampled_from([Op.POST, Op.WAIT, Op.SEND, Op.RELEASE]))
    device, position, gone = data.draw(st.sampled_from(list(listed(case.programs, op))))
    del case.programs[device][position]
    error = refused(case.programs)
    assert error.device in (device, gone.peer)
    found = case.programs[error.device][error.position]
    channel = message(device, gone)
    assert message(error.device, found)[:-1] == channel[:-1]
    assert found.micro_batch in (gone.micro_batch, gone.micro_batch + 1)
    assert str(found) in str(error)


@given(with_messages(), st.data())
def test_a_doubled_instruction_is_refused(case: Case, data: st.DataObject) -> None:
    op = data.draw(st.sampled_from([Op.POST, Op.WAIT, Op.SEND, Op.RELEASE]))
    device, position, each = data.draw(st.sampled_from(list(listed(case.programs, op))))
    case.programs[device].insert(position + 1, each)
    error = refused(case.programs)
    assert (error.device, error.position) == (device, position + 1)
    assert f"{each} stands twice" in str(error)


@given(with_messages(), st.data())
def test_a_swap_within_a_channel_is_refused(case: Case, data: st.DataObject) -> None:
    op = data.draw(st.sampled_from([Op.POST, Op.WAIT, Op.SEND, Op.RELEASE]))
    pairs = [
        (device, i, j)
        for device, i, one in listed(case.programs, op)
        for j, other in enumerate(case.programs[device])
        if j > i and other == one._replace(micro_batch=other.micro_batch)
    ]
    if not pairs:
        return  # no pipeline has two micro-batches
    device, i, j = data.draw(st.sampled_from(pairs))
    program = case.programs[device]
    program[i], program[j] = program[j], program[i]
    error = refused(case.programs)
    assert (error.device, error.position) == (device, i)
    assert f"{program[i]} is out of sequence" in str(error)


@given(with_messages(), st.data())
@pytest.mark.parametrize(("first", "second"), [(Op.POST, Op.WAIT), (Op.SEND, Op.RELEASE)])
def test_an_end_before_its_beginning_is_refused(
    first: Op, second: Op, case: Case, data: st.DataObject
) -> None:
    """The last of a channel is moved: its sequence stays."""
    last = [
        (device, position, each)
        for device, position, each in listed(case.programs, first)
        if each.micro_batch == case.problem.models[each.model].micro_batches - 1
    ]
    device, position, each = data.draw(st.sampled_from(last))
    program = case.programs[device]
    end = program.index(each._replace(op=second))
    program.insert(end, program.pop(position))
    error = refused(case.programs)
    assert (error.device, error.position) == (device, end - 1)
    assert f"{second.name} {each.token} device {each.peer} without {first.name} before" in str(
        error
    )


@given(with_messages(), st.data())
@pytest.mark.parametrize(
    ("ends", "left", "missing"),
    [((Op.POST, Op.WAIT), Op.SEND, Op.POST), ((Op.SEND, Op.RELEASE), Op.POST, Op.SEND)],
)
def test_a_message_that_one_end_knows_nothing_of_is_refused(
    ends: tuple[Op, Op], left: Op, missing: Op, case: Case, data: st.DataObject
) -> None:
    last = [
        (device, each)
        for device, _, each in listed(case.programs, ends[0])
        if each.micro_batch == case.problem.models[each.model].micro_batches - 1
    ]
    device, each = data.draw(st.sampled_from(last))
    for op in ends:
        case.programs[device].remove(each._replace(op=op))
    error = refused(case.programs)
    found = case.programs[error.device][error.position]
    assert (error.device, found.op, found.token) == (each.peer, left, each.token)
    assert f"{found} has no {missing.name}" in str(error)


def test_sends_that_wait_for_each_other_are_a_deadlock() -> None:
    """Buffered sends would end here: the proof is of the transport that blocks most."""
    programs = [
        [
            Instruction(Op.FORWARD, mine, 0, "F", 0, 0),
            Instruction(Op.SEND, mine, 0, "F", 0, 0, peer=1 - mine),
            Instruction(Op.POST, 1 - mine, 0, "F", 0, 1, peer=1 - mine),
            Instruction(Op.WAIT, 1 - mine, 0, "F", 0, 1, peer=1 - mine),
            Instruction(Op.FORWARD, 1 - mine, 0, "F", 0, 1),
            Instruction(Op.RELEASE, mine, 0, "F", 0, 0, peer=1 - mine),
        ]
        for mine in range(2)
    ]
    error = refused(programs)
    assert (error.device, error.position) == (0, 1)
    for part in ("device 0 at position 1: SEND a0F0 device 1", "device 1 at position 1: SEND b0F0"):
        assert part in str(error)
    assert run(programs, "posted", seed=0) == [(0, 1), (1, 1)]
    assert run(programs, "buffered", seed=0) == []


@given(with_messages(), SEEDS, st.sampled_from([0.1, 0.5, 1.0]))
def test_late_receives_are_refused_exactly_where_they_stop_a_blocking_send(
    case: Case, seed: int, share: float
) -> None:
    """Receives begin anywhere up to their WAIT: some programs end, the others are refused."""
    rng = Random(seed)
    for program in case.programs:
        # The last first: those of a channel do not overtake each other.
        for post in [each for each in reversed(program) if each.op is Op.POST]:
            if rng.random() >= share:
                continue
            start = program.index(post)
            ends = [program.index(post._replace(op=Op.WAIT))]
            after = post._replace(micro_batch=post.micro_batch + 1)
            ends += [program.index(after)] if after in program else []
            program.insert(rng.randint(start, min(ends) - 1), program.pop(start))
    stuck = run(case.programs, "posted", seed)
    if not stuck:
        prove(case.programs)
        return
    error = refused(case.programs)
    assert "a deadlock" in str(error)
    assert (error.device, error.position) == min(stuck)


# What cannot be lowered


def test_a_circle_is_refused_with_its_place() -> None:
    order = ordered(ONE_WAY, "a0F0 a0B0 a0F1 a0B1", "a0F0 a0F1 a0B0 a0B1")
    with pytest.raises(OrderError, match=r"a deadlock: .* waits for") as caught:
        lower(ONE_WAY, order)
    assert (caught.value.device, caught.value.position) in [(0, 1), (1, 1)]


@pytest.mark.parametrize(
    ("rows", "device", "position", "wanted"),
    [
        (("a0F1 a0F0 a0B0 a0B1", "a0F0 a0B0 a0F1 a0B1"), 0, 0, "a0F0"),
        (("a0F0 a0F1 a0B1 a0B0", "a0F0 a0F1 a0B1 a0B0"), 0, 2, "a0B0"),
        (("a0F0 a0F1 a0B0 a0B1", "a0F0 a0F1 a0B1 a0B0"), 1, 2, "a0B0"),
    ],
)
def test_micro_batches_out_of_sequence_are_refused(
    rows: tuple[str, str], device: int, position: int, wanted: str
) -> None:
    with pytest.raises(OrderError, match=f"in sequence, here {wanted}:") as caught:
        lower(ONE_WAY, ordered(ONE_WAY, *rows))
    assert (caught.value.device, caught.value.position) == (device, position)


@given(st.data())
def test_any_two_micro_batches_swapped_are_refused(data: st.DataObject) -> None:
    problem = data.draw(problems(repeat_devices=False, split_backward=False))
    order = data.draw(orders_in_sequence(problem))
    pairs = [
        (device, i, j)
        for device, row in enumerate(order)
        for j, later in enumerate(row)
        for i, earlier in enumerate(row[:j])
        if later == earlier._replace(micro_batch=later.micro_batch)
    ]
    if not pairs:
        return  # one micro-batch each
    device, i, j = data.draw(st.sampled_from(pairs))
    row = order[device]
    row[i], row[j] = row[j], row[i]
    with pytest.raises(OrderError, match=f"here {row[j].token}:") as caught:
        lower(problem, order)
    assert (caught.value.device, caught.value.position) == (device, i)


@pytest.mark.parametrize(
    ("second", "field"),
    [
        (model(((0, 1),), weight_gradient=0.5), r"models\[1\]\.weight_gradient"),
        (model(((0, 1), (1, 1))), r"models\[1\]\.pipelines\[1\]: passes a device twice"),
    ],
)
def test_what_megatron_cannot_run_is_refused(second: Model, field: str) -> None:
    problem = Problem(2, (model(((0, 1),)), second))
    with pytest.raises(ScheduleError, match=f"^{field}"):
        lower(problem, greedy(problem).order)


@pytest.mark.parametrize("ahead", [0, -1])
def test_a_receive_must_be_posted_ahead(ahead: int) -> None:
    with pytest.raises(ScheduleError, match=f"^ahead: .* got {ahead}"):
        lower(ONE_WAY, ONE_WAY_ORDER, ahead)


# The words of a program


def test_a_small_program_reads_as_it_runs() -> None:
    first, last = lower(ONE_WAY, ONE_WAY_ORDER, ahead=1)
    assert [str(each) for each in first] == [
        "POST a0B0 device 1",
        "FORWARD a0F0",
        "SEND a0F0 device 1",
        "FREE a0F0",
        "FORWARD a0F1",
        "SEND a0F1 device 1",
        "FREE a0F1",
        "WAIT a0B0 device 1",
        "RELEASE a0F0 device 1",
        "POST a0B1 device 1",
        "BACKWARD a0B0",
        "WAIT a0B1 device 1",
        "RELEASE a0F1 device 1",
        "BACKWARD a0B1",
    ]
    assert [str(each) for each in last] == [
        "POST a0F0 device 0",
        "WAIT a0F0 device 0",
        "POST a0F1 device 0",
        "FORWARD a0F0",
        "BACKWARD a0B0",
        "SEND a0B0 device 0",
        "WAIT a0F1 device 0",
        "FORWARD a0F1",
        "BACKWARD a0B1",
        "SEND a0B1 device 0",
        "RELEASE a0B0 device 0",
        "RELEASE a0B1 device 0",
    ]


@given(cases())
def test_both_ends_call_a_message_the_same(case: Case) -> None:
    expected = {
        (each.sender, each.receiver, each.model, each.pipeline, each.kind == "F", each.micro_batch)
        for each in messages(case.problem, kinds_of(case.order))
    }
    for op in (Op.SEND, Op.POST, Op.WAIT, Op.RELEASE):
        found = {message_of(device, each) for device, _, each in listed(case.programs, op)}
        assert found == expected
