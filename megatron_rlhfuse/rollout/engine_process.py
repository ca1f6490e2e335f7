"""The program of a generation instance: one vLLM engine that obeys its trainer rank.

Started by rollout.child as `python -m megatron_rlhfuse.rollout.engine_process FD PARENT_PID`, FD
being one end of a socket pair. vLLM lives here, and not in the trainer, because it has a
torch.distributed world, allocator settings and signal handlers of its own.

Invariants:
- generation waits neither for the parent to read (a thread sends) nor makes it wait (a thread
  receives);
- the process outlives its parent by a moment at most: the kernel kills it when the parent dies,
  and so does the receiving thread when the socket ends. Workers of a tensor-parallel engine
  follow it in the same way (rollout.plugin);
- an exception reaches the parent as text; a worker that is killed ends this process like a kill.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from megatron_rlhfuse.rollout.lifetime import allow_many_files, die_with_parent
from megatron_rlhfuse.rollout.messages import Failed

# Connections pickle. Both ends of this one are inherited descriptors of a parent and its child;
# nothing else can reach it.


class Outbox:
    """Sends messages to the parent from a thread of its own."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    @property
    def empty(self) -> bool:
        """Whether nothing waits to be sent."""
        return self._queue.empty()

    def put(self, message: object) -> None:
        """Queues a message."""
        self._queue.put(message)

    def flush(self) -> None:
        """Returns once all messages are sent; nothing may be put afterwards."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (message := self._queue.get()) is not None:
            try:
                self._connection.send(message)
            except OSError:
                _die()  # the parent is gone


def _receive(connection: Connection, inbox: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            inbox.put(connection.recv())
    except (EOFError, OSError):
        _die()  # the parent is gone


def _die() -> NoReturn:
    """Ends this process at once, from any thread and whatever it is doing."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def main() -> int:
    """Runs one instance; the exit status is 0 after a Stop."""
    descriptor, parent = (int(argument) for argument in sys.argv[1:])
    die_with_parent(parent)
    allow_many_files()  # workers inherit it
    # These are the parent's to handle, also when all processes of a job get them.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)

    connection = Connection(descriptor)
    configure = connection.recv()
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    outbox = Outbox(connection)
    threading.Thread(target=_receive, args=(connection, inbox), name="inbox", daemon=True).start()
    loop = None
    try:
        from megatron_rlhfuse.rollout.engine_loop import EngineLoop

        loop = EngineLoop(configure, inbox, outbox)
        loop.run()
    except Exception:
        text = traceback.format_exc()
        print(text, file=sys.stderr, flush=True)
        if loop is not None and loop.lost_a_worker:
            _die()
        outbox.put(Failed(text))
        outbox.flush()
        return 1
    loop.close()
    outbox.flush()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is shut down; taking torch's and vLLM's modules apart would cost seconds.
    os._exit(status)
