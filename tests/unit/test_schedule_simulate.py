"""`rlhfuse simulate`: cluster descriptions, the numbers, and one line for bad input."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_rlhfuse import cli
from megatron_rlhfuse.schedule import baselines, simulate
from megatron_rlhfuse.schedule.cluster import load_cluster, parse_cluster
from megatron_rlhfuse.schedule.cluster_problem import plan_cluster
from megatron_rlhfuse.schedule.errors import InfeasibleError, ProblemError
from megatron_rlhfuse.schedule.estimate import Training, estimate_stages
from megatron_rlhfuse.schedule.evaluate import Timeline, evaluate
from megatron_rlhfuse.schedule.layout import Parallelism
from megatron_rlhfuse.schedule.presets import GPUS, SHAPES
from megatron_rlhfuse.schedule.problem import Problem, load_problem

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = sorted((ROOT / "examples" / "clusters").glob("*.json"))

MEASURED: dict[str, Any] = {
    "nodes": 1,
    "gpus_per_node": 8,
    "gpu": "H800",
    "sequence_length": 512,
    "micro_batch_size": 2,
    "mini_batch_size": 32,
    "mini_batches": 4,
    "p2p": 0,
    "actor": {
        "tp": 1,
        "pp": 8,
        "dp": 1,
        "measured": {"forward": 5, "backward": 10, "activation": 1.95, "resident": 20},
    },
    "critic": {
        "tp": 1,
        "pp": 4,
        "dp": 2,
        "measured": {"forward": 4, "backward": 8, "activation": 2, "resident": 30},
    },
}
"""RLHFuse's instance 1: 16 and 8 micro-batches per pipeline."""

LLAMA_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_attention_heads": 32,
    "vocab_size": 32_000,
}


@pytest.fixture
def instant_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-to-back 1F1B in place of every fused schedule."""

    def greedy(problem: Problem) -> Timeline:
        return evaluate(problem, baselines.one_f_one_b(problem))

    class Result:
        def __init__(self, problem: Problem) -> None:
            self.timeline = greedy(problem)

    monkeypatch.setattr(simulate, "greedy", greedy)
    monkeypatch.setattr(simulate, "search", lambda problem, **_: Result(problem))


def edited(edit: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    data = copy.deepcopy(MEASURED)
    edit(data)
    return data


def put(path: str, value: Any) -> Callable[[dict[str, Any]], object]:
    """An edit: sets the field at `path`."""

    def edit(data: dict[str, Any]) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            data = data[parent]
        data[name] = value

    return edit


def written(folder: Path, data: Any) -> str:
    path = folder / "cluster.json"
    path.write_text(json.dumps(data))
    return str(path)


def test_measured_stages_make_the_published_problem() -> None:
    _, problem = plan_cluster(parse_cluster(MEASURED, Path()))
    published = load_problem(ROOT / "examples" / "problems" / "published-01.json")
    for made, known in zip(problem.models, published.models, strict=True):
        assert made.micro_batches == known.micro_batches
        assert made.pipelines == known.pipelines
        assert (made.forward, made.backward) == (known.forward, known.backward)
        assert made.activation == known.activation
    assert problem.memory_limit == (30.0,) * 8


def test_serial_numbers_are_those_of_the_paper(instant_search: None) -> None:
    result = simulate.simulate(parse_cluster(MEASURED, Path()), seconds=1)
    serial = result.runs[simulate.SERIAL]
    assert serial.time == 477  # table of the published instances
    assert max(serial.peak) == pytest.approx(8 * 1.95)
    assert result.runs[simulate.ZB_H1].time == baselines.serial_zb_h1(result.problem)
    assert result.runs[simulate.INTERLEAVED].time == pytest.approx(
        baselines.serial_interleaved_1f1b(result.problem)
    )
    work = 16 * (5 + 10) + 8 * (4 + 8)
    assert result.bubble_fraction(477) == pytest.approx(1 - work / 477)
    assert result.speed_up(477 / 2) == 2
    assert result.stage_seconds(477) == pytest.approx(4 * 0.477)


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_examples_can_be_planned_and_fit(path: Path, instant_search: None) -> None:
    result = simulate.simulate(load_cluster(path), seconds=1)
    assert result.placement.models[0].parallelism.world_size == result.cluster.gpus
    assert all(result.fits(run) for run in result.runs.values())
    assert result.lower_bound <= result.runs[simulate.BACK_TO_BACK].time
    assert simulate.notes(result)[0].startswith("memory: fits")


def test_there_are_examples() -> None:
    assert len(CLUSTERS) >= 3


def test_activations_over_the_limit_are_reported(instant_search: None) -> None:
    def tighten(data: dict[str, Any]) -> None:
        data["actor"]["measured"]["resident"] = 40  # 10 GB are left; 1F1B holds 15.6

    result = simulate.simulate(parse_cluster(edited(tighten), Path()), seconds=1)
    assert not result.fits(result.runs[simulate.SERIAL])
    assert "DOES NOT FIT" in simulate.notes(result)[0]


def test_an_infeasible_search_is_reported_not_raised(
    instant_search: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(problem: Problem, **_: Any) -> None:
        raise InfeasibleError("memory_limit: too low")

    monkeypatch.setattr(simulate, "greedy", refuse)
    monkeypatch.setattr(simulate, "search", refuse)
    result = simulate.simulate(parse_cluster(MEASURED, Path()), seconds=1)
    assert result.best_fused is None
    lines = simulate.notes(result)
    assert "DOES NOT FIT" in lines[0]
    assert f"{simulate.SEARCHED}: memory_limit: too low" in lines


def test_stages_of_unequal_size_are_noted(instant_search: None) -> None:
    (path,) = (path for path in CLUSTERS if path.stem == "33b-13b-256gpus")
    lines = simulate.notes(simulate.simulate(load_cluster(path), seconds=1))
    assert any(line.startswith("actor: 60 layers on 8 stages are 7 or 8") for line in lines)
    assert not any(line.startswith("critic") for line in lines)


def test_the_critic_has_a_value_head() -> None:
    def use_presets(data: dict[str, Any]) -> None:
        for role in ("actor", "critic"):
            del data[role]["measured"]
            data[role]["preset"] = "llama-7b"

    _, problem = plan_cluster(parse_cluster(edited(use_presets), Path()))
    actor, critic = problem.models
    assert critic.forward[-1] == pytest.approx(critic.forward[1], rel=1e-3)
    assert actor.forward[-1] > 1.05 * actor.forward[1]


def test_a_hugging_face_folder_gives_the_shape_it_describes(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(LLAMA_7B))

    def use_folder(data: dict[str, Any]) -> None:
        del data["actor"]["measured"]
        data["actor"]["config"] = "model"

    cluster = load_cluster(written(tmp_path, edited(use_folder)))
    assert cluster.models[0].source == SHAPES["llama-7b"]
    assert cluster.models[0].label == "model"


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("hidden_act", "gelu", "'hidden_act' is 'gelu'"),
        ("hidden_size", "wide", "config.json is malformed"),
        ("num_attention_heads", 0, "config.json is malformed"),
        ("num_hidden_layers", -3, "the model's layers is -3"),
        ("num_key_value_heads", 5, "32 heads do not divide over 5 groups"),
    ],
)
def test_a_bad_hugging_face_folder_is_named(
    field: str, value: Any, says: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_7B, field: value}))
    data = edited(put("critic", {"tp": 1, "pp": 4, "dp": 2, "config": "."}))
    with pytest.raises(ProblemError) as caught:
        parse_cluster(data, tmp_path)
    assert says in str(caught.value)
    assert str(caught.value).startswith("critic")
    assert "\n" not in str(caught.value)


def test_own_gpu_and_own_shape() -> None:
    def use_own(data: dict[str, Any]) -> None:
        gpu = {name: getattr(GPUS["H800"], name) for name in GPUS["H800"].__dataclass_fields__}
        data["gpu"] = {**gpu, "memory_gb": 160}
        del data["actor"]["measured"]
        shape = SHAPES["llama-7b"]
        names = ("layers", "hidden", "ffn_hidden", "heads", "vocab")
        data["actor"]["shape"] = {name: getattr(shape, name) for name in names}

    _, problem = plan_cluster(parse_cluster(edited(use_own), Path()))
    expected = estimate_stages(
        SHAPES["llama-7b"], Parallelism(1, 8, 1), Training(512, 2), GPUS["H800"]
    )
    assert problem.models[0].forward == expected.forward
    assert problem.memory_limit[0] == pytest.approx(160 - 30 - expected.resident[0])


BAD_FIELDS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (put("nodes", 0), "nodes: want a whole number"),
    (put("nodes", 4_000_000), "nodes: 32000000 GPUs"),
    (put("gpu", "V100"), "gpu: want one of H100, H800, A100; got 'V100'"),
    (put("gpu", {"memory_gb": 80}), "gpu.hbm_gb_per_s: missing"),
    (put("actor.measured.forward", 1e200), "actor.measured.forward: want a number above 0"),
    (put("speed", 1), "speed: unknown field"),
    (put("sp\need", 1), "unknown field"),
    (put("sequence_length", 1.5), "sequence_length: want a whole number"),
    (put("micro_batch_size", 3), "micro_batch_size: want a divisor of mini_batch_size 32"),
    (put("mini_batch_size", 34), "critic.dp: 17 micro-batches"),
    (put("mini_batch_size", 4_000_000), "models: 48000000 subtasks"),
    (put("recomputation", "some"), "recomputation: want one of none, selective, full"),
    (put("sequence_parallel", 1), "sequence_parallel: want true or false"),
    (put("mfu", 1.5), "mfu: want a share"),
    (put("link_efficiency", 0), "link_efficiency: want a number of at least 0.001"),
    (put("p2p", None), "p2p: missing"),
    (put("actor", 7), "actor: want a JSON object"),
    (put("actor.tp", 3), "actor.tp: want a divisor of gpus_per_node 8"),
    (
        put("actor.dp", 2),
        "actor.dp: TP 1 x PP 8 x DP 2 = 16 must take all 8 GPUs of the cluster; dp 1",
    ),
    (put("actor.cp", 2), "actor.cp: unknown field"),
    (put("actor.preset", "llama-7b"), "actor: want exactly one of"),
    (put("actor.measured", None), "actor: want exactly one of"),
    (put("actor.measured.forward", [1, 2]), "actor.measured.forward: want a number, or one per"),
    (put("actor.measured.forward", 0), "actor.measured.forward: want a number above 0"),
    (put("critic.measured.resident", 70), "memory: weights, gradients"),
    (put("critic", {"tp": 1, "pp": 4, "dp": 2, "preset": "gpt"}), "critic.preset: want one of"),
    (
        put("critic", {"tp": 8, "pp": 1, "dp": 1, "preset": "llama-33b"}),
        "critic.tp: want a divisor",
    ),
    (put("critic", {"tp": 1, "pp": 4, "dp": 2, "config": "none"}), "critic.config: none is no"),
]


@pytest.mark.parametrize(("edit", "says"), BAD_FIELDS, ids=[says for _, says in BAD_FIELDS])
def test_a_bad_field_is_one_line_and_status_2(
    edit: Callable[[dict[str, Any]], object],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, edited(edit))
    with pytest.raises(SystemExit) as ended:
        cli.main(["simulate", "cluster.json"])
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("rlhfuse simulate: error: cluster.json: ")
    assert says in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none.json"], "none.json: No such file"),
        (["text.json"], "text.json: not JSON"),
        (["."], ".: Is a directory"),
        (["cluster.json", "--seconds", "0"], "--seconds: want a number of seconds above 0"),
        (["cluster.json", "--seconds", "nan"], "--seconds"),
        (["cluster.json", "--threads", "0"], "--threads: want a whole number from 1"),
        (["cluster.json", "--seed", "-1"], "--seed"),
        (["cluster.json", "--json", "no/such.json"], "--json: no/such.json must be a file"),
        (["cluster.json", "--png", "."], "--png: . must be a file"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, MEASURED)
    (tmp_path / "text.json").write_text("nodes: 4")
    with pytest.raises(SystemExit) as ended:
        cli.main(["simulate", *arguments])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_a_searched_schedule_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real search, in a fraction of a second."""
    outputs = [str(tmp_path / name) for name in ("out.json", "out.png", "problem.json")]
    arguments = ["--seconds", "0.3", "--threads", "1"]
    for flag, path in zip(("--json", "--png", "--problem"), outputs, strict=True):
        arguments += [flag, path]
    assert cli.main(["simulate", written(tmp_path, MEASURED), *arguments]) == 0

    numbers = json.loads(Path(outputs[0]).read_text())
    times = {name: entry["mini_batch_ms"] for name, entry in numbers["schedules"].items()}
    assert times["serial 1F1B"] == 477
    assert numbers["lower_bound_ms"] <= times["searched fused"] <= times["greedy fused"]
    assert numbers["schedules"]["searched fused"]["fits"]
    assert Path(outputs[1]).read_bytes().startswith(b"\x89PNG")
    _, problem = plan_cluster(parse_cluster(MEASURED, Path()))
    assert load_problem(outputs[2]) == problem

    printed = capsys.readouterr().out.splitlines()
    row = next(line for line in printed if line.startswith("serial 1F1B"))
    expected = "serial 1F1B 477.0 ms 1.91 s 29.6 % 1.00x 15.6 GB 30.0 GB yes"
    assert " ".join(row.split()) == expected
    for name in times:
        assert sum(line.startswith(name) for line in printed) == 1
    assert any(line.startswith("memory: fits") for line in printed)


def test_interleaving_that_is_not_defined_is_a_row_without_numbers(
    instant_search: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = edited(put("mini_batch_size", 24))  # 12 micro-batches on 8 stages
    assert cli.main(["simulate", written(tmp_path, fewer)]) == 0
    printed = capsys.readouterr().out
    (row,) = (line for line in printed.splitlines() if line.startswith("serial interleaved 1F1B  "))
    assert set(row.split()[3:]) == {"-"}
    assert "serial interleaved 1F1B: wants micro-batches" in printed


def test_a_cluster_is_an_object() -> None:
    with pytest.raises(ProblemError, match=r"^cluster: want a JSON object"):
        parse_cluster([], Path())
