"""The installer's promises, on stub Pythons: no network, no real environment.

What is checked: which Python is chosen and what is said when none fits; a finished environment is
left alone; an interrupted install starts over; nothing but a virtual environment is cleared; a
failing step is named; the pinned lists are consistent and complete.
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("install.sh", "find_python.sh")
LISTS = ("base.txt", "dev.txt", "vllm-cpu.txt", "vllm-cuda.txt")
CHECK = runpy.run_path(str(ROOT / "scripts/check_install.py"))
PIN = runpy.run_path(str(ROOT / "scripts/pin_requirements.py"))

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"),
    reason="the pinned lists and the installer are for Linux x86_64",
)

# Answers what the installer asks of a Python; writes each pip and venv call to $CALLS.
# $BREAK_AT names an argument at which pip fails; $KILL_AT one at which it kills the installer.
STUB_PYTHON = r"""#!/bin/bash
case "$1 $2" in
    "-c "*ensurepip*) echo "$0" ;;
    "-c "*) exit 0 ;;
    "-m venv")
        echo "venv $*" >>"$CALLS"
        rm -rf "$4" && mkdir -p "$4/bin" && touch "$4/pyvenv.cfg" && cp "$0" "$4/bin/python" ;;
    "-m pip")
        echo "pip ${*: -1}" >>"$CALLS"
        [ "${*: -1}" != "${KILL_AT:-}" ] || kill -9 $PPID
        [ "${*: -1}" != "${BREAK_AT:-}" ] || { echo "no such version"; exit 7; } ;;
    *check_install.py*) echo "installed: stubs" ;;
esac
"""

TOO_OLD = '#!/bin/bash\necho "is Python 3.9"; exit 3\n'
SHIM = '#!/bin/bash\necho "pyenv: $0: command not found" >&2; exit 127\n'


def write_program(path: Path, text: str) -> Path:
    """An executable script at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def find_python(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run find_python.sh seeing only the programs in `folder`/bin and `folder`/pyenv."""
    tools = folder / "tools"
    tools.mkdir()
    for tool in ("bash", "find", "sort", "sed"):
        (tools / tool).symlink_to(shutil.which(tool) or f"/bin/{tool}")
    environment = {"PATH": f"{folder}/bin:{tools}", "PYENV_ROOT": f"{folder}/pyenv", **variables}
    return subprocess.run(
        [ROOT / "scripts/find_python.sh"], env=environment, text=True, capture_output=True
    )


def test_a_shim_that_fails_is_passed_over_for_pyenvs_newest_3_12(tmp_path: Path) -> None:
    write_program(tmp_path / "bin/python3.12", SHIM)
    for version in ("3.11.7", "3.13.0", *(f"3.12.{patch}" for patch in range(11))):
        write_program(tmp_path / f"pyenv/versions/{version}/bin/python", STUB_PYTHON)
    found = find_python(tmp_path)
    assert found.stdout.strip() == f"{tmp_path}/pyenv/versions/3.12.10/bin/python", found.stderr


def test_a_python_on_path_that_starts_comes_before_pyenvs(tmp_path: Path) -> None:
    write_program(tmp_path / "bin/python3.12", SHIM)
    wanted = write_program(tmp_path / "bin/python3.13", STUB_PYTHON)
    write_program(tmp_path / "pyenv/versions/3.12.1/bin/python", STUB_PYTHON)
    assert find_python(tmp_path).stdout.strip() == str(wanted)


def test_a_named_python_that_does_not_fit_is_refused_though_another_would_do(
    tmp_path: Path,
) -> None:
    write_program(tmp_path / "bin/python3.12", STUB_PYTHON)
    old = write_program(tmp_path / "old/python", TOO_OLD)
    found = find_python(tmp_path, PYTHON=str(old))
    assert found.returncode == 1
    assert f"{old}: is Python 3.9" in found.stderr
    assert "PYTHON=/path/to/python3.12" in found.stderr


def test_no_python_at_all_says_what_was_tried(tmp_path: Path) -> None:
    write_program(tmp_path / "bin/python3.12", SHIM)
    found = find_python(tmp_path)
    assert found.returncode == 1 and found.stdout == ""
    assert f"{tmp_path}/bin/python3.12: does not start" in found.stderr
    assert "Python 3.12 or 3.13 is needed" in found.stderr


def test_the_question_it_asks_is_one_a_real_python_answers(tmp_path: Path) -> None:
    found = find_python(tmp_path, PYTHON=sys.executable)
    assert found.returncode == 0, found.stderr
    version = [found.stdout.strip(), "-c", "import sys; print(sys.version_info[:2])"]
    assert subprocess.check_output(version, text=True).strip() == str(sys.version_info[:2])


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the installer reads, with a stub Python beside it."""
    for name in ("requirements", "scripts"):
        (tmp_path / name).mkdir()
    for name in (
        *(f"scripts/{name}" for name in (*SCRIPTS, "check_install.py")),
        *(f"requirements/{name}" for name in LISTS),
        "pyproject.toml",
        "setup.py",
    ):
        shutil.copy(ROOT / name, tmp_path / name)
    write_program(tmp_path / "stub/python3.12", STUB_PYTHON)
    return tmp_path


def install(tree: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the installer of the copied tree with the stub Python."""
    environment = {
        "PATH": os.environ["PATH"],
        "CALLS": f"{tree}/calls",
        "PYTHON": f"{tree}/stub/python3.12",
        **variables,
    }
    command = [str(tree / "scripts/install.sh"), *flags]
    return subprocess.run(command, env=environment, text=True, capture_output=True)


def calls(tree: Path) -> list[str]:
    """The pip and venv calls since the last time this was asked, by their last argument."""
    path = tree / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [line.split()[-1].removeprefix(f"{tree}/") for line in lines]


ON_TOP = ["requirements/base.txt", "requirements/vllm-cpu.txt", "requirements/dev.txt", "."]
FROM_SCRATCH = [".venv", *ON_TOP]


def test_a_second_call_does_nothing_and_says_so_in_one_line(tree: Path) -> None:
    first = install(tree, "--cpu")
    assert first.returncode == 0, first.stderr
    assert calls(tree) == FROM_SCRATCH
    second = install(tree)
    assert second.stdout == f"{tree}/.venv is ready (cpu)\n"
    assert calls(tree) == []


@pytest.mark.parametrize("name", ["requirements/vllm-cpu.txt", "setup.py", "csrc/new.cpp"])
def test_a_changed_input_installs_again_on_top(tree: Path, name: str) -> None:
    install(tree, "--cpu")
    calls(tree)
    (tree / name).parent.mkdir(exist_ok=True)
    with (tree / name).open("a") as file:
        file.write("# changed\n")
    assert install(tree).returncode == 0
    assert calls(tree) == ON_TOP
    install(tree)
    assert calls(tree) == []


def test_a_list_of_the_other_flavour_does_not_count(tree: Path) -> None:
    install(tree, "--cpu")
    (tree / "requirements/vllm-cuda.txt").write_text("# changed\n")
    calls(tree)
    install(tree)
    assert calls(tree) == []


def test_the_other_flavour_starts_from_an_empty_environment(tree: Path) -> None:
    install(tree, "--cpu")
    calls(tree)
    assert install(tree, "--cuda").returncode == 0
    assert calls(tree)[:3] == [".venv", "requirements/base.txt", "requirements/vllm-cuda.txt"]
    assert install(tree).stdout == f"{tree}/.venv is ready (cuda)\n"


def test_a_driver_that_answers_selects_cuda(tree: Path) -> None:
    write_program(tree / "stub/nvidia-smi", "#!/bin/bash\nexit 0\n")
    found = install(tree, PATH=f"{tree}/stub:{os.environ['PATH']}")
    assert "requirements/vllm-cuda.txt" in calls(tree), found.stderr


def test_a_killed_install_starts_over(tree: Path) -> None:
    killed = install(tree, "--cpu", KILL_AT="requirements/vllm-cpu.txt")
    assert killed.returncode == -9
    calls(tree)
    assert install(tree, "--cpu").returncode == 0
    assert calls(tree) == FROM_SCRATCH
    assert not (tree / ".venv.unfinished").exists()


def test_a_failing_step_is_named_with_the_end_of_its_log(tree: Path) -> None:
    failed = install(tree, "--cpu", BREAK_AT="requirements/dev.txt")
    assert failed.returncode == 1
    assert 'the step "test and lint tools" failed with status 7' in failed.stderr
    assert "| no such version" in failed.stderr
    assert "no such version" in (tree / ".venv/install.log").read_text()
    calls(tree)
    assert install(tree, "--cpu").returncode == 0
    assert calls(tree) == ON_TOP


def test_an_environment_whose_python_is_gone_is_made_anew(tree: Path) -> None:
    install(tree, "--cpu")
    calls(tree)
    (tree / ".venv/bin/python").unlink()
    assert install(tree).returncode == 0
    assert calls(tree) == FROM_SCRATCH


def test_a_folder_that_is_no_environment_is_refused_and_kept(tree: Path) -> None:
    precious = tree / "home/thesis.txt"
    precious.parent.mkdir()
    precious.write_text("all of it")
    refused = install(tree, "--cpu", VENV=str(precious.parent))
    assert refused.returncode == 1 and "no virtual environment" in refused.stderr
    assert precious.read_text() == "all of it"
    assert calls(tree) == []


def test_an_unknown_flag_is_refused(tree: Path) -> None:
    refused = install(tree, "--gpu")
    assert refused.returncode == 1 and "unknown argument --gpu" in refused.stderr


@pytest.mark.parametrize("script", [*(f"scripts/{name}" for name in SCRIPTS), ".ci/run"])
def test_shell_scripts_parse_and_can_be_executed(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    assert "set -euo pipefail" in (ROOT / script).read_text()
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_a_missing_and_a_different_version_are_each_named(tmp_path: Path) -> None:
    pins = tmp_path / "pins.txt"
    pins.write_text("# a comment\npytest==0.1\nno-such-package==2.0\n")
    command = [sys.executable, str(ROOT / "scripts/check_install.py"), str(pins)]
    checked = subprocess.run(command, text=True, capture_output=True)
    assert checked.returncode == 1
    assert f"pytest: 0.1 is needed, {pytest.__version__} is in " in checked.stderr
    assert "no-such-package: 2.0 is needed, it is not installed" in checked.stderr
    assert "remedy: " in checked.stderr


def test_a_module_that_does_not_import_is_named_with_its_error() -> None:
    [problem] = CHECK["import_problems"](["json", "no_such_module"])
    assert problem == "import no_such_module: ModuleNotFoundError: No module named 'no_such_module'"


@pytest.mark.parametrize("bad", ["torch>=2\n", "torch==1\ntorch==2\n"])
def test_a_list_that_is_not_pinned_or_pins_twice_is_refused(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "pins.txt"
    path.write_text(bad)
    with pytest.raises(SystemExit, match=r"pins\.txt:\d: "):
        CHECK["read_pins"]([path])


@pytest.mark.parametrize("engine", ["vllm-cpu.txt", "vllm-cuda.txt"])
def test_the_lists_of_a_flavour_agree_on_every_version(engine: str) -> None:
    pins = CHECK["read_pins"]([ROOT / "requirements" / name for name in ("base.txt", engine)])
    tools = CHECK["read_pins"]([ROOT / "requirements/dev.txt"])
    assert pins["torch"] == "2.13.0" and pins["megatron-core"] == "0.19.2"
    assert not {name for name in tools if name in pins and tools[name] != pins[name]}


def test_the_base_list_holds_what_pyproject_needs_and_nothing_else() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needs = [*settings["project"]["dependencies"], *settings["build-system"]["requires"]]
    pins = CHECK["read_pins"]([ROOT / "requirements/base.txt"])
    assert set(PIN["closure"](needs, set())) == set(pins)


def test_a_need_that_is_not_installed_cannot_be_pinned() -> None:
    with pytest.raises(SystemExit, match="no-such-package>=1 is needed but not installed"):
        PIN["closure"](["no-such-package>=1"], set())
