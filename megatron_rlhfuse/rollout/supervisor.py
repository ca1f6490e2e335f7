"""Keeps one engine program running: starts it again when it dies, reports it when it cannot go on.

A child that dies (a kill, a lost worker, lack of memory) is replaced, a limited number of times.
A child that raises is not: it would raise again. A child that is silent while an answer is due is
killed. The owner is asked through a callback to hand every new child what it needs.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

from megatron_rlhfuse.rollout.child import Child, ChildGone, ChildStuck, log_tail
from megatron_rlhfuse.rollout.messages import Configure, Failed, Ready, Stop

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
"""Of one instance in a run: a flaky node is survived, a crash loop is reported."""

STOP_TIMEOUT_S = 10.0
"""For an engine to end its workers in order, before it is killed."""


class EngineError(RuntimeError):
    """A generation instance failed for good; the message names it and shows the end of its log."""


class EngineHang(EngineError):  # noqa: N818  # the word for it
    """A generation instance had something to do and was silent for too long; it was killed."""


class Supervisor:
    """The running engine program of a generation instance, whichever process that is just now."""

    def __init__(self, configure: Configure, on_start: Callable[[], None]) -> None:
        """Prepares; nothing runs yet.

        Args:
            configure: what every child builds.
            on_start: called after every start; may call `send`, nothing else.
        """
        self._configure = configure
        self._on_start = on_start
        self._child: Child | None = None
        self._heard = 0.0  # time.monotonic() of the last message, either way
        self.restarts = 0
        """How often a child was started again after one had died."""
        self.ready: Ready | None = None
        """What the running child said when it was built; None before."""

    def start(self) -> None:
        """Starts the first child without waiting for it."""
        if self._child is not None:
            raise RuntimeError(self._name("runs already"))
        self._launch()

    @property
    def pid(self) -> int:
        """Of the running child."""
        return self._running().pid

    def send(self, message: object) -> None:
        """Sends a message to the child; a child that is gone is noticed by `receive`.

        Raises:
            EngineError: no child runs.
            EngineHang: the child takes no messages.
        """
        child = self._running()
        self._heard = time.monotonic()
        try:
            child.send(message)
        except ChildGone:
            pass
        except ChildStuck:
            raise self._hang("messages wait to be read") from None

    def receive(self, timeout_s: float, due: str | None) -> list[object]:
        """Returns the messages that are there, after waiting at most `timeout_s` for the first.

        Args:
            timeout_s: seconds.
            due: why the child must not be silent, such as "2 samples are unfinished"; its
                silence then counts as a hang after step_timeout_s. None: it may be silent.

        Raises:
            EngineError: the child raised, or died more often than MAX_RESTARTS.
            EngineHang: silent for step_timeout_s, or not ready start_timeout_s after its start.
        """
        child = self._running()
        options = self._configure.options
        if self.ready is None:
            due, limit = "it is starting", options.start_timeout_s
        else:
            limit = options.step_timeout_s
        messages: list[object] = []
        try:
            if due is not None:
                timeout_s = min(timeout_s, self._heard + limit - time.monotonic())
            message = child.receive(timeout_s)
            while message is not None:
                self._heard = time.monotonic()
                if isinstance(message, Failed):
                    self._end()
                    raise EngineError(self._name(f"failed\n{message.text.rstrip()}"))
                if isinstance(message, Ready):
                    self.ready = message
                else:
                    messages.append(message)
                message = child.receive(0.0)
        except ChildGone:
            # What it said before its end counts; the owner handles that before it hears of the
            # new child's needs, so the restart is left to the next call.
            if not messages:
                self._restart()
        except ChildStuck:
            raise self._hang(due or "it stopped in the middle of a message") from None
        if not messages and due is not None and time.monotonic() - self._heard >= limit:
            raise self._hang(due)
        return messages

    def close(self) -> None:
        """Ends the child, in order where it still listens; idempotent."""
        if self._child is None:
            return
        with contextlib.suppress(ChildGone, ChildStuck):  # ended below all the same
            self._child.send(Stop())
            self._child.wait(STOP_TIMEOUT_S)
        self._end()

    def _launch(self) -> None:
        self.ready = None
        self._heard = time.monotonic()
        self._child = Child(self._configure)
        self._on_start()

    def _restart(self) -> None:
        pid, how = self.pid, self._end()
        if self.restarts == MAX_RESTARTS:
            raise EngineError(
                self._report(f"(pid {pid}) ended by {how}, after {MAX_RESTARTS} restarts")
            )
        self.restarts += 1
        logger.warning(
            self._name("(pid %d) ended by %s; starting it again (%d of %d)"),
            pid,
            how,
            self.restarts,
            MAX_RESTARTS,
        )
        self._launch()

    def _running(self) -> Child:
        if self._child is None:
            raise EngineError(self._name("does not run"))
        return self._child

    def _end(self) -> str:
        child, self._child = self._running(), None
        return child.end()

    def _hang(self, what: str) -> EngineHang:
        silent = time.monotonic() - self._heard
        pid = self.pid
        self._end()
        return EngineHang(
            self._report(f"(pid {pid}) hangs: silent for {silent:.1f} s although {what}; killed it")
        )

    def _report(self, what: str) -> str:
        return f"{self._name(what)}\n{log_tail(self._configure.options.log_file)}"

    def _name(self, what: str) -> str:
        return f"generation instance {self._configure.instance} {what}"
