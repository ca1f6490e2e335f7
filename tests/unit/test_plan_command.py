"""`rlhfuse plan`: the files it writes, the checks of what it reads, and one line for bad input."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_rlhfuse.cli import main
from megatron_rlhfuse.schedule.order import order_from_csv, order_to_tokens
from megatron_rlhfuse.schedule.plan import load_plan

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "examples/problems/published-01.json"
QUICK = ["--iterations", "64", "--threads", "1"]

SMALL: dict[str, Any] = {
    "devices": 2,
    "p2p": 0,
    "memory_limit": 8,
    "models": [
        {
            "name": "actor <&\"'> $\\frac{$",
            "micro_batches": 4,
            "forward": 1.5,
            "backward": [2, 2.5],
            "activation": 2,
            "pipelines": [[0, 1]],
        },
        {
            "name": "critic",
            "micro_batches": 3,
            "forward": 1,
            "backward": 3,
            "weight_gradient": 1,
            "activation": 1,
            "pipelines": [[1, 0]],
        },
    ],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a problem in small.json."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    return tmp_path


def run(*arguments: str) -> tuple[int, list[str], list[str]]:
    """Exit status, lines on stdout and on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(["plan", *arguments])
        except SystemExit as ended:
            assert isinstance(ended.code, int)
            status = ended.code
    return status, out.getvalue().splitlines(), err.getvalue().splitlines()


def succeed(*arguments: str) -> list[str]:
    status, out, err = run(*arguments)
    assert (status, err) == (0, [])
    return out


def refuse(*arguments: str) -> str:
    """The one line that bad input gives."""
    status, _, err = run(*arguments)
    assert status == 2
    (line,) = err
    assert line.startswith("rlhfuse plan: error: ")
    assert line.isprintable()
    return line


def value(lines: list[str], name: str) -> str:
    """What a line of the report says."""
    (line,) = (line for line in lines if line.startswith(name))
    return line[len(name) :].strip()


class Text(HTMLParser):
    """The text of a page, and whether every element that opened has closed."""

    VOID = ("meta", "link", "input", "br", "hr", "img", "path", "rect", "line")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_published_instance_is_planned_at_its_bound() -> None:
    lines = succeed(str(PUBLISHED), "--iterations", "600", "--stop-at-bound")
    assert value(lines, "makespan") == "372: no plan is shorter"
    assert value(lines, "serial 1F1B") == "477: the plan is 1.28x as fast"
    assert value(lines, "by").startswith("guided search, ")


def test_every_file_is_written_and_well_formed(folder: Path) -> None:
    names = {flag: f"out.{flag}" for flag in ("csv", "png", "svg", "html", "trace")}
    flags = [text for flag, name in names.items() for text in (f"--{flag}", name)]
    lines = succeed("small.json", *QUICK, "-o", "plan.json", *flags)
    assert set(value(lines, "wrote").split(", ")) == {"plan.json", *names.values()}
    assert {path.name for path in folder.iterdir()} == {"small.json", "plan.json", *names.values()}

    plan = load_plan("plan.json")
    assert plan.timeline.problem.models[0].name == SMALL["models"][0]["name"]
    shown = value(lines, "makespan").partition(":")[0]
    assert float(shown) == pytest.approx(plan.timeline.makespan, rel=1e-3)

    assert order_from_csv(Path("out.csv").read_text()) == order_to_tokens(plan.timeline.order)
    again = succeed("small.json", "--order", "out.csv", "-o", "again.json")
    assert value(again, "by") == "order of out.csv, checked"
    assert load_plan("again.json").timeline == plan.timeline

    assert Path("out.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert ElementTree.parse("out.svg").getroot().tag.endswith("svg")
    page = Text(Path("out.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert shown in page.text
    assert 'actor <&"' in page.text
    trace = json.loads(Path("out.trace").read_text())
    subtasks = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    # serial 1F1B is not in it
    assert len(subtasks) == plan.timeline.problem.subtasks


def test_a_plan_that_is_given_is_checked_and_drawn(folder: Path) -> None:
    succeed("small.json", *QUICK, "-o", "plan.json")
    lines = succeed("plan.json", "--svg", "plan.svg", "-o", "copy.json")
    assert value(lines, "by") == "plan of plan.json, checked"
    one, other = load_plan("plan.json"), load_plan("copy.json")
    assert (one.timeline, one.greedy) == (other.timeline, other.greedy)
    assert Path("plan.svg").exists()
    tighter = refuse("plan.json", "--memory-limit", str(max(one.timeline.peak_activation) - 1))
    assert "plan.json: order: device" in tighter and "of activation memory" in tighter

    data = json.loads(Path("plan.json").read_text())
    data["makespan"] -= 1
    Path("plan.json").write_text(json.dumps(data))
    assert "plan.json: makespan: the file says" in refuse("plan.json")


def test_an_order_that_is_given_is_improved_where_there_is_a_budget(folder: Path) -> None:
    succeed(str(PUBLISHED), "--method", "greedy", "-o", "first.json", "--csv", "first.csv")
    first = load_plan("first.json")
    for source in (["first.json"], [str(PUBLISHED), "--order", "first.csv"]):
        lines = succeed(*source, "--iterations", "600", "-o", "better.json")
        assert "guided search" in value(lines, "by") and "first" in value(lines, "by")
        better = load_plan("better.json")
        assert better.timeline.makespan == better.lower_bound < first.timeline.makespan


def test_a_split_backward_makes_w_subtasks(folder: Path) -> None:
    succeed("small.json", "--split-backward", *QUICK, "-o", "plan.json")
    models = load_plan("plan.json").timeline.problem.models
    assert models[0].weight_gradient == (1.0, 1.25)
    assert models[1].weight_gradient == (1.0, 1.0)  # was split already


@pytest.mark.parametrize("method", ["guided", "annealing", "greedy", "exact"])
def test_every_method_makes_a_plan(method: str, folder: Path) -> None:
    if method == "exact":
        pytest.importorskip("ortools", reason="OR-tools is not installed")
    budgets = {"exact": ["--seconds", "20"], "greedy": []}
    budget = budgets.get(method, ["--iterations", "500"])
    lines = succeed("small.json", "--method", method, *budget, "-o", "plan.json")
    plan = load_plan("plan.json")
    assert plan.timeline.makespan <= plan.greedy
    assert plan.timeline.over_limit() is None
    assert value(lines, "by").startswith(method)
    if method == "exact":
        assert value(lines, "by") == "exact (CP-SAT): proven optimal"


def test_identical_models_in_opposite_directions_are_compared_with_chimera(folder: Path) -> None:
    model = {"micro_batches": 8, "forward": 1, "backward": 2, "activation": 1}
    models = [{**model, "pipelines": [line]} for line in ([0, 1, 2, 3], [3, 2, 1, 0])]
    Path("twins.json").write_text(json.dumps({"devices": 4, "models": models}))
    lines = succeed("twins.json", *QUICK)
    assert float(value(lines, "Chimera")) >= float(value(lines, "makespan").partition(":")[0])
    assert not any(line.startswith("Chimera") for line in succeed("small.json", *QUICK))


def test_a_folder_with_plans_is_left_alone(folder: Path) -> None:
    Path("mine").mkdir()
    Path("mine/plan-07.json").write_text("mine")
    assert "holds plans already" in refuse("small.json", *QUICK, "--pareto", "mine")
    assert Path("mine/plan-07.json").read_text() == "mine"


def test_outputs_do_not_replace_inputs_links_or_devices(folder: Path) -> None:
    before = Path("small.json").read_text()
    assert "is an input" in refuse("small.json", *QUICK, "-o", "small.json")
    assert "written by --output" in refuse("small.json", *QUICK, "-o", "x", "--csv", "./x")
    assert Path("small.json").read_text() == before
    Path("target.json").touch()
    Path("link.json").symlink_to("target.json")
    succeed("small.json", *QUICK, "-o", "link.json", "--csv", "/dev/null")
    assert Path("link.json").is_symlink()
    assert load_plan("target.json").timeline.makespan > 0
    assert Path("/dev/null").is_char_device()
    succeed("target.json", *QUICK, "-o", "target.json")  # a plan may be improved in its place


def test_a_baseline_that_does_not_fit_is_said_to(folder: Path) -> None:
    lines = succeed("small.json", *QUICK, "--memory-limit", "2")
    assert value(lines, "serial 1F1B").endswith("it does not keep the memory limit")


def test_a_reader_that_leaves_early_is_no_error(folder: Path) -> None:
    command = [sys.executable, "-m", "megatron_rlhfuse", "plan", "small.json", *QUICK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_the_same_seed_gives_the_same_file(folder: Path) -> None:
    orders = []
    for name, seed, threads in [("a", "3", "1"), ("b", "3", "2"), ("c", "4", "2")]:
        budget = ["--iterations", "300", "--seed", seed, "--threads", threads]
        succeed(str(PUBLISHED), *budget, "-o", name)
        orders.append(load_plan(name).timeline.order)
    assert orders[0] == orders[1] != orders[2]


def test_a_memory_limit_stands_in_place_of_the_problems(folder: Path) -> None:
    succeed("small.json", *QUICK, "--memory-limit", "4.5", "-o", "plan.json")
    plan = load_plan("plan.json")
    assert plan.timeline.problem.memory_limit == (4.5, 4.5)
    assert max(plan.timeline.peak_activation) <= 4.5
    line = refuse("small.json", "--memory-limit", "1.5")
    assert "small.json: memory_limit: device 0 has 1.5, a micro-batch of actor " in line
    assert line.endswith(" takes 2 there")


def test_the_highest_memory_limit_gives_a_plan_that_can_be_read(folder: Path) -> None:
    succeed("small.json", *QUICK, "--memory-limit", "1e15", "-o", "plan.json")
    succeed("plan.json")


def test_a_front_is_a_folder_of_plans(folder: Path) -> None:
    lines = succeed(str(PUBLISHED), "--iterations", "800", "--pareto", "new/front")
    paths = sorted((folder / "new/front").glob("plan-*.json"))
    assert [path.name for path in paths] == [f"plan-{n:02d}.json" for n in range(len(paths))]
    assert len(paths) >= 2
    timelines = [load_plan(path).timeline for path in paths]
    peaks = [max(timeline.peak_activation) for timeline in timelines]
    assert sorted({timeline.makespan for timeline in timelines}) == [t.makespan for t in timelines]
    assert sorted(set(peaks), reverse=True) == peaks
    for path in paths:
        assert any(line.endswith(str(path.relative_to(folder))) for line in lines)
    assert (folder / "new/front/front.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none.json"], "none.json: No such file"),
        (["."], ".: Is a directory"),
        (["two\nlines"], "two\\nlines: No such file"),
        (["text"], "text: not JSON"),
        (["binary"], "binary: not JSON"),
        (["deep"], "deep: not JSON: nested too deeply"),
        (["empty"], "empty: not JSON"),
        (["list.json"], "list.json: problem: want a JSON object, got list"),
        (["m"], "m: models[0].forward: want a number above 0"),
        (["small.json", "--order", "none.csv"], "none.csv: No such file"),
        (["small.json", "--order", "binary"], "binary: not text"),
        (["small.json", "--order", "text"], "text: order: 1 rows, but the problem has 2 devices"),
        (["small.json", "--fast"], "unrecognized arguments: --fast"),
        (["small.json", "a\nb"], "unrecognized arguments: a\\nb"),
        (["small.json", "--seconds", "0"], "--seconds: want a number of seconds above 0"),
        (["small.json", "--seconds", "nan"], "--seconds"),
        (["small.json", "--seconds", "soon"], "--seconds"),
        (["small.json", "--iterations", "0"], "--iterations: want a whole number from 1"),
        (["small.json", "--threads", "0"], "--threads: want a whole number from 1"),
        (["small.json", "--seed", "-1"], "--seed"),
        (["small.json", "--method", "magic"], "--method: invalid choice: 'magic'"),
        (["small.json", "--memory-limit", "-1"], "--memory-limit: want a number of at least 0"),
        (["small.json", "--memory-limit", "nan"], "--memory-limit: want a number of at least 0"),
        (["small.json", "--memory-limit", "1e300"], "--memory-limit: want a number"),
        (["small.json", "--memory-limit", "0"], "small.json: memory_limit: device 0 has 0, a"),
        (["small.json", "-o", "."], "--output: . must be a file"),
        (["small.json", "-o", "no/plan.json"], "--output: no/plan.json must be a file in a folder"),
        (["small.json", "--png", "plan.jpg"], "--png: plan.jpg must end in .png"),
        (["small.json", "--svg", "plan"], "--svg: plan must end in .svg"),
        (["small.json", "--pareto", "f", "--method", "exact"], "--pareto: goes with the guided"),
        (["small.json", "--pareto", "f", "--order", "text"], "--pareto: wants a problem"),
        (["small.json", "--split-backward", "--order", "text"], "--split-backward: wants a"),
        (["small.json", "--method", "greedy", "--order", "text"], "--method: only the guided"),
        (["small.json", "--seed", "3", "--order", "text"], "--seed: wants --seconds or"),
        (["small.json", "--pareto", "f", "-o", "p.json"], "--pareto: writes a plan per point"),
        (["small.json", *QUICK, "--pareto", "text"], "text: File exists"),
        (["small.json", *QUICK, "--pareto", "text/f"], "text/f: Not a directory"),
        (["small.json", "--method", "exact", "--iterations", "9"], "--iterations: the exact"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], says: str, folder: Path) -> None:
    (folder / "text").write_text("devices: 2")
    (folder / "binary").write_bytes(bytes(range(128, 256)))
    (folder / "deep").write_text("[" * 100_000)
    (folder / "empty").write_text("")
    (folder / "list.json").write_text("[1, 2]")
    (folder / "m").write_text(
        json.dumps({**SMALL, "models": [{**SMALL["models"][0], "forward": 0}]})
    )
    line = refuse(*arguments)
    assert says in line
    if not says.startswith(("-", "unrecognized")):  # a file is at fault: it is named, once
        assert line.startswith(f"rlhfuse plan: error: {says}")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="the folder nobody can write is /proc")
@pytest.mark.parametrize("flag", ["--output", "--csv", "--png", "--svg", "--html", "--trace"])
def test_a_file_that_cannot_be_written_is_named(flag: str, folder: Path) -> None:
    path = f"/proc/plan.{flag[2:]}"
    assert f"{path}" in refuse("small.json", "--method", "greedy", flag, path)


def test_a_wrong_order_is_shown_in_a_grid(folder: Path) -> None:
    succeed("small.json", "--method", "greedy", "-o", "plan.json", "--csv", "order.csv")
    rows = order_from_csv(Path("order.csv").read_text())
    rows[1][2] = "a0F9"
    Path("order.csv").write_text("\n".join(",".join(row) for row in rows))
    for arguments, name in [(["small.json", "--order", "order.csv"], "order.csv"), (["p"], "p")]:
        data = {**json.loads(Path("plan.json").read_text()), "order": rows}
        Path("p").write_text(json.dumps(data))
        status, out, err = run(*arguments)
        assert status == 2
        (line,) = err
        assert line == (
            f"rlhfuse plan: error: {name}: device 1, position 2 (a0F9): the problem has no such "
            "micro-batch"
        )
        assert [row for row in out if "[a0F9]" in row] == [row for row in out if row[0] == ">"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=4),
    lambda item: st.lists(item, max_size=3) | st.dictionaries(st.text(max_size=4), item),
    max_leaves=8,
)
FIELDS = [*SMALL, *SMALL["models"][0], "weight_gradient"]


@st.composite
def damaged_problems(draw: st.DrawFn) -> Any:
    """The small problem with some fields replaced, lost or misspelt."""
    data = json.loads(json.dumps(SMALL))
    for _ in range(draw(st.integers(1, 3))):
        target = draw(st.sampled_from([data, *data["models"]]))
        name = draw(st.sampled_from(FIELDS) | st.text(max_size=4))
        if draw(st.booleans()):
            target.pop(name, None)
        else:
            target[name] = draw(JSON)
        if not isinstance(data.get("models"), list) or not all(
            isinstance(model, dict) for model in data["models"]
        ):
            break
    return data


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=30) | (JSON | damaged_problems()).map(json.dumps))
def test_any_file_is_planned_or_refused_in_one_line(content: str | bytes, folder: Path) -> None:
    path = folder / "any.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, out, err = run("any.json", "--iterations", "2", "--threads", "1")
    if status == 0:
        assert err == []
        assert float(value(out, "makespan").partition(":")[0].replace(",", "")) > 0
    else:
        assert status == 2
        (line,) = err
        assert line.startswith("rlhfuse plan: error: any.json: ")
        assert line.isprintable()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "megatron_rlhfuse", "plan", *arguments]


def test_the_command_by_itself(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    done = subprocess.run(
        command(str(PUBLISHED), *QUICK, "-o", str(plan)),
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    assert load_plan(plan).timeline.makespan <= 399
    assert f"wrote        {plan}" in done.stdout.splitlines()
    plan.write_text("{")
    failed = subprocess.run(
        command(str(plan)), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.count("\n") == 1


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    script = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "from megatron_rlhfuse.cli import main; import sys; main(sys.argv[1:])"
    )
    flags = ["--method", "greedy", "-o", str(tmp_path / "plan.json")]
    done = subprocess.run(
        [sys.executable, "-c", script, "plan", str(PUBLISHED), *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "rlhfuse plan: error: writing the results: File too large\n"


@pytest.mark.parametrize("method", ["guided", "annealing"])
def test_ctrl_c_ends_the_search_with_its_best_plan(method: str, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    flags = ["--seconds", "60", "--threads", "1", "--method", method]
    # It says when the search begins: a Ctrl-C during the imports ends the program as always.
    script = (
        "import sys; from megatron_rlhfuse.schedule import search; drive = search._drive\n"
        "def told(*a): print('go', flush=True); drive(*a)\n"
        "search._drive = told\n"
        "from megatron_rlhfuse.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    problem = ROOT / "examples/problems/published-09.json"
    with subprocess.Popen(
        [sys.executable, "-c", script, "plan", str(problem), *flags, "-o", str(plan)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        out, err = process.communicate(timeout=30)
        assert time.monotonic() - began < 15
    assert (process.returncode, err) == (0, "")
    assert load_plan(plan).seconds < 30
    assert f"wrote        {plan}" in out.splitlines()
