"""Replays programs under rendezvous: sends block until their receive is posted.

Nothing that a program does can undo what another one waits for. So if the replay ends, the programs
end in every interleaving, whatever time transfers take, and with transports that block less.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rlhfuse.schedule.errors import LoweringError
from megatron_rlhfuse.schedule.program import Message, Op, Program, message_of


def prove(programs: Sequence[Program]) -> None:
    """Replays the programs with sends that block until their receive is posted.

    Raises LoweringError naming device, position and instruction where they do not end, where a
    message is sent, posted or waited for twice or never, or where a channel's messages are
    received in another sequence than they are sent.
    """
    _check_messages(programs)
    replay = Replay([list(program) for program in programs])
    if not replay.run():
        device = replay.first_stuck()
        waits = "; ".join(
            f"device {d} at position {p}: {programs[d][p]}" for d, p in replay.stuck()[:8]
        )
        raise LoweringError(device, replay.position[device], f"a deadlock: {waits}")


class Replay:
    """Runs programs under blocking sends: SEND waits for the POST, WAIT for the SEND.

    Every device stands at its `position`; a blocked one wakes when its message is posted or sent.
    """

    def __init__(self, programs: list[Program]) -> None:
        self.programs = programs
        self.position = [0] * len(programs)
        self._posted: set[Message] = set()
        self._sent: set[Message] = set()
        self._runnable = list(range(len(programs)))

    def run(self) -> bool:
        """Goes on until every program has ended (True), or nothing can go on."""
        while self._runnable:
            device = self._runnable.pop()
            program = self.programs[device]
            while self.position[device] < len(program):
                instruction = program[self.position[device]]
                op, peer = instruction.op, instruction.peer
                key = message_of(device, instruction)
                if op is Op.POST:
                    self._posted.add(key)
                    self._wake(peer)
                elif op is Op.SEND:
                    if key not in self._posted:
                        break
                    self._sent.add(key)
                    self._wake(peer)
                elif op is Op.WAIT and key not in self._sent:
                    break
                self.position[device] += 1
        return not self.stuck()

    def _wake(self, device: int) -> None:
        if device not in self._runnable:
            self._runnable.append(device)

    def stuck(self) -> list[tuple[int, int]]:
        """(device, position) of those that have not ended."""
        return [(d, p) for d, p in enumerate(self.position) if p < len(self.programs[d])]

    def first_stuck(self) -> int:
        return self.stuck()[0][0]

    def post_for_blocked_sends(self) -> None:
        """Moves the receives that sends stand still for to where their receiver stands.

        A send that blocks has earlier messages of its channel posted: exactly one is missing.
        """
        for device, position in self.stuck():
            instruction = self.programs[device][position]
            if instruction.op is not Op.SEND:
                continue
            receiver, key = instruction.peer, message_of(device, instruction)
            program, here = self.programs[receiver], self.position[receiver]
            there = next(
                i
                for i in range(here, len(program))
                if program[i].op is Op.POST and message_of(receiver, program[i]) == key
            )
            program.insert(here, program.pop(there))
            self._wake(receiver)
        if not self._runnable:
            # The order was found executable: some device stands at a send, or none stands.
            raise AssertionError(f"devices stand still without a send: {self.stuck()}")


def _check_messages(programs: Sequence[Program]) -> None:
    """Every message once at both ends, in one sequence per channel, and each end in its order."""
    found: dict[Op, dict[Message, tuple[int, int]]] = {
        op: {} for op in (Op.POST, Op.WAIT, Op.SEND, Op.RELEASE)
    }
    for device, program in enumerate(programs):
        last: dict[tuple[int, ...], int] = {}
        for position, instruction in enumerate(program):
            if instruction.op not in found:
                continue
            key = message_of(device, instruction)
            if key in found[instruction.op]:
                raise LoweringError(device, position, f"{instruction} stands twice")
            found[instruction.op][key] = (device, position)
            channel = (instruction.op, *key[:-1])
            if instruction.micro_batch != last.get(channel, -1) + 1:
                raise LoweringError(device, position, f"{instruction} is out of sequence")
            last[channel] = instruction.micro_batch
    for first, second in ((Op.POST, Op.WAIT), (Op.SEND, Op.RELEASE)):
        for key, (device, position) in found[second].items():
            if found[first].get(key, (device, position))[1] >= position:
                instruction = programs[device][position]
                raise LoweringError(device, position, f"{instruction} without {first.name} before")
    for first, second in ((Op.POST, Op.WAIT), (Op.SEND, Op.POST), (Op.SEND, Op.RELEASE)):
        for one, other in ((first, second), (second, first)):
            for key, (device, position) in found[one].items():
                if key not in found[other]:
                    instruction = programs[device][position]
                    raise LoweringError(device, position, f"{instruction} has no {other.name}")
