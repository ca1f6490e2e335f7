"""An engine program without an engine: speaks the protocol, and misbehaves as it is told.

STUB_PLAN lists, comma separated, what each start of the program does; the last word holds for all
later starts. STUB_STARTS names a file that counts the starts.
    ok       behaves
    start    dies before it is ready
    update   dies when weights arrive
    submit   makes half of the samples, sends them, and dies
    raise    reports an exception when requests arrive
    silent   says nothing, but reads
    deaf     gets ready and reads nothing more
Whatever it is told it prints, so that it stands in the log.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_rlhfuse.rollout.lifetime import die_with_parent
from megatron_rlhfuse.rollout.messages import (
    Asleep,
    Configure,
    Failed,
    Finished,
    Ready,
    Sleep,
    Stop,
    Submit,
    UpdateWeights,
    WeightsLoaded,
)
from megatron_rlhfuse.rollout.samples import GenerationRequest, Sample

WEIGHT_NAMES = ("a", "b")


def next_part() -> str:
    with open(os.environ["STUB_STARTS"], "a") as starts:
        starts.write("start\n")
    plan = os.environ["STUB_PLAN"].split(",")
    number = len(Path(os.environ["STUB_STARTS"]).read_text().splitlines())
    return plan[min(number, len(plan)) - 1]


def make(instance: int, request: GenerationRequest, version: int) -> Sample:
    """The response is the seed, so that a sample tells whose it is."""
    return Sample(
        request.sample_id, request.prompt, (request.seed,), (-1.0,), "stop", version, instance, 0, 0
    )


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    die_with_parent(int(sys.argv[2]))
    connection = Connection(int(sys.argv[1]))
    configure = connection.recv()
    assert isinstance(configure, Configure)
    part = next_part()
    if part == "start":
        die()
    if part != "silent":
        connection.send(Ready(WEIGHT_NAMES, kv_tokens=1024, kv_bytes_per_token=8.0))
    if part == "deaf":
        time.sleep(600)
    version = -1
    while True:
        command = connection.recv()
        print(type(command).__name__, flush=True)
        match command:
            case UpdateWeights():
                if part == "update":
                    die()
                version = command.version
                connection.send(WeightsLoaded(version))
            case Submit():
                if part == "raise":
                    connection.send(Failed("ValueError: no such token"))
                    return
                made = [(t, make(configure.instance, r, version)) for t, r in command.requests]
                if part == "submit":
                    connection.send(Finished(tuple(made[: len(made) // 2])))
                    die()
                connection.send(Finished(tuple(made)))
            case Sleep():
                connection.send(Asleep())
            case Stop():
                return


if __name__ == "__main__":
    main()
