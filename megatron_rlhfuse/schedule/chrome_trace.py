"""A schedule as a Chrome trace, which opens in Perfetto (https://ui.perfetto.dev).

The conventions are those of the trace a run leaves (`observe/trace.py`):
- JSON object format; one process, one thread per device, all of them named;
- spans of a thread do not overlap; timestamps are microseconds, whole nanoseconds, in order;
- a counter has its device in its name, since viewers keep counters per process.

PURE: from a timeline to a dict that `json.dumps` takes.
"""

from __future__ import annotations

from typing import Any

from megatron_rlhfuse.schedule.draw_numbers import KIND_NAMES, memory_curve, model_names
from megatron_rlhfuse.schedule.errors import ScheduleError
from megatron_rlhfuse.schedule.evaluate import Timeline

PROCESS = "schedule"


def chrome_trace(timeline: Timeline, seconds_per_unit: float = 1e-3) -> dict[str, Any]:
    """The trace of `timeline`; a unit of the problem's time takes `seconds_per_unit` seconds.

    Every subtask is a complete event named by its token; a counter per device gives its activation
    memory. Raises ScheduleError unless `seconds_per_unit` is positive.
    """
    if not seconds_per_unit > 0:
        raise ScheduleError(f"seconds_per_unit: want a number above 0, got {seconds_per_unit:g}")
    names = [_name("process_name", 0, {"name": PROCESS})]
    events = []
    for device in range(timeline.problem.devices):
        names.append(_name("thread_name", device, {"name": f"device {device}"}))
        names.append(_name("thread_sort_index", device, {"sort_index": device}))
        events += _subtask_events(timeline, device, seconds_per_unit)
        events += _memory_events(timeline, device, seconds_per_unit)
    events.sort(key=lambda event: (event["ts"], -event.get("dur", 0.0)))
    return {
        "displayTimeUnit": "ms",
        "otherData": {"makespan": timeline.makespan, "seconds_per_unit": seconds_per_unit},
        "traceEvents": names + events,
    }


def _subtask_events(timeline: Timeline, device: int, unit_s: float) -> list[dict[str, Any]]:
    models, events = model_names(timeline.problem), []
    for position, subtask in enumerate(timeline.order[device]):
        start_ns = _ns(timeline.start[device][position], unit_s)
        end_ns = _ns(timeline.end(device, position), unit_s)
        events.append(
            {
                "name": subtask.token,
                "cat": "training",
                "ph": "X",
                "pid": 0,
                "tid": device,
                "ts": start_ns / 1e3,
                "dur": (end_ns - start_ns) / 1e3,
                "args": {
                    "token": subtask.token,
                    "model": models[subtask.model],
                    "kind": KIND_NAMES[subtask.kind],
                    "micro_batch": subtask.micro_batch,
                    "pipeline": subtask.pipeline,
                    "stage": subtask.stage,
                },
            }
        )
    return events


def _memory_events(timeline: Timeline, device: int, unit_s: float) -> list[dict[str, Any]]:
    return [
        {
            "name": f"device {device}: activation memory",
            "ph": "C",
            "pid": 0,
            "ts": _ns(time, unit_s) / 1e3,
            "args": {"value": value},
        }
        for time, value in memory_curve(timeline, device)
    ]


def _name(kind: str, tid: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": 0, "tid": tid, "args": args}


def _ns(time: float, unit_s: float) -> int:
    return round(time * unit_s * 1e9)
