"""`rlhfuse patch`, on copies of the installed Megatron.

All or nothing, said in one line; the tree as it was where it fails; the patched tree works.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

from megatron_rlhfuse import patch_command
from megatron_rlhfuse.cli import main

ROOT = Path(__file__).resolve().parents[2]
SCHEDULES = "megatron/core/pipeline_parallel/schedules.py"
INFO = "megatron/core/package_info.py"
VERSION = "0.19.2"
PATCH = ROOT / f"patches/megatron-core-{VERSION}/fused-forward-backward.patch"

pytestmark = [
    pytest.mark.skipif(shutil.which("git") is None, reason="needs the git program"),
    pytest.mark.skipif(
        metadata.version("megatron-core") != VERSION, reason=f"needs megatron-core {VERSION}"
    ),
]


def installed_file(name: str) -> Path:
    return Path(str(metadata.distribution("megatron-core").locate_file(name)))


def make_tree(root: Path) -> Path:
    """The two files that the command looks at."""
    for name in (SCHEDULES, INFO):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(installed_file(name), root / name)
    return root


@pytest.fixture(params=["alone", "in a repository that ignores it"])
def tree(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "alone":
        return make_tree(tmp_path / "tree")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("/lib/\n")
    return make_tree(tmp_path / "lib/site-packages")


@pytest.fixture
def plain_tree(tmp_path: Path) -> Path:
    return make_tree(tmp_path / "tree")


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a folder, so that leftovers show."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def patch(action: str, path: Path | str, capsys: pytest.CaptureFixture[str]) -> str:
    """Runs the command, which must succeed; what its one line says after the tree's name."""
    assert main(["patch", f"--{action}", str(path)]) == 0
    output = capsys.readouterr()
    (line,) = output.out.splitlines()
    assert output.err == ""
    return line.partition(f"(megatron-core {VERSION}): ")[2]


def refusal(action: str, path: Path | str, capsys: pytest.CaptureFixture[str]) -> str:
    """Runs the command, which must fail with status 2 and the one line returned."""
    with pytest.raises(SystemExit) as ended:
        main(["patch", f"--{action}", str(path)])
    assert ended.value.code == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert output.out == ""
    return line


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_in_and_out_and_each_of_them_twice(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stock = contents(tree)
    assert patch("check", tree, capsys) == "applies"
    assert patch("reverse", tree, capsys) == "not patched, nothing to do"
    assert contents(tree) == stock

    assert patch("apply", tree, capsys) == f"patched {SCHEDULES}"
    patched = contents(tree)
    assert patched.keys() == stock.keys()
    assert [name for name in stock if patched[name] != stock[name]] == [SCHEDULES]
    compile(patched[SCHEDULES], SCHEDULES, "exec")

    assert patch("check", tree, capsys) == "already applied"
    assert patch("apply", tree, capsys) == "already applied, nothing to do"
    assert contents(tree) == patched
    assert patch("reverse", tree, capsys) == f"took the patches out of {SCHEDULES}"
    assert contents(tree) == stock


def test_path_may_be_the_megatron_folder_and_relative(
    plain_tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain_tree / "megatron")
    assert patch("apply", ".", capsys) == f"patched {SCHEDULES}"
    assert patch("check", plain_tree / "megatron", capsys) == "already applied"


def test_a_tree_edited_elsewhere_keeps_its_edits(
    plain_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = plain_tree / SCHEDULES
    path.write_text("# A line of one's own.\n" + path.read_text() + "\nOWN = 1\n")
    own = path.read_bytes()
    patch("apply", plain_tree, capsys)
    assert path.read_text().startswith("# A line") and path.read_text().endswith("OWN = 1\n")
    patch("reverse", plain_tree, capsys)
    assert path.read_bytes() == own


@pytest.mark.parametrize("action", ["check", "apply", "reverse"])
def test_a_tree_changed_at_that_place_is_left_as_it_is(
    tree: Path, capsys: pytest.CaptureFixture[str], action: str
) -> None:
    edit(tree / SCHEDULES, "    return forward_backward_func\n", "    return own_schedule\n")
    before = contents(tree)
    line = refusal(action, tree, capsys)
    assert SCHEDULES in line and PATCH.name in line and "restore" in line
    assert contents(tree) == before


@pytest.mark.parametrize("action", ["check", "apply", "reverse"])
def test_a_half_patched_tree_is_left_as_it_is(
    plain_tree: Path, capsys: pytest.CaptureFixture[str], action: str
) -> None:
    patch("apply", plain_tree, capsys)
    wrapped = "    return with_fusion(forward_backward_func)\n"
    edit(plain_tree / SCHEDULES, wrapped, "    return forward_backward_func\n")
    before = contents(plain_tree)
    assert SCHEDULES in refusal(action, plain_tree, capsys)
    assert contents(plain_tree) == before


def test_another_version_is_named_with_those_supported(
    plain_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(plain_tree / INFO, "PATCH = 2", "PATCH = 0")
    edit(plain_tree / INFO, 'PRE_RELEASE = ""', 'PRE_RELEASE = "rc1"')
    line = refusal("apply", plain_tree, capsys)
    assert "0.19.0rc1" in line and VERSION in line


@pytest.mark.parametrize(
    ("info", "culprit"), [("MAJOR = 0\nPATCH = 2\n", "MINOR"), ("MAJOR =\n", "syntax")]
)
def test_a_version_that_cannot_be_read_is_refused(
    plain_tree: Path, capsys: pytest.CaptureFixture[str], info: str, culprit: str
) -> None:
    (plain_tree / INFO).write_text(info)
    line = refusal("check", plain_tree, capsys)
    assert culprit in line and INFO in line


def test_the_version_is_read_without_running_the_file(
    plain_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = plain_tree / INFO
    info.write_text(info.read_text() + "\nraise SystemExit('was run')\n")
    assert patch("check", plain_tree, capsys) == "applies"


def test_a_path_that_is_no_tree_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "No such file" in refusal("check", tmp_path / "none", capsys)
    assert INFO in refusal("apply", tmp_path, capsys)


def test_a_tree_without_the_file_is_refused(
    plain_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (plain_tree / SCHEDULES).unlink()
    assert SCHEDULES in refusal("apply", plain_tree, capsys)


def test_a_missing_git_is_named(
    plain_tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(plain_tree))
    assert "git is not on PATH" in refusal("apply", plain_tree, capsys)


@pytest.mark.parametrize(
    ("argv", "culprit"),
    [(["x"], "--check"), (["--check"], "PATH"), (["--check", "--apply", "x"], "--apply")],
)
def test_one_flag_and_a_path_are_needed(
    argv: list[str], culprit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["patch", *argv])
    assert ended.value.code == 2
    assert culprit in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("name", [SCHEDULES, str(Path(SCHEDULES).parent)])
def test_a_tree_that_may_not_be_written_is_refused(
    plain_tree: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    before = contents(plain_tree)
    path = plain_tree / name
    mode = path.stat().st_mode
    path.chmod(mode & ~0o222)
    try:
        line = refusal("apply", plain_tree, capsys)
    finally:
        path.chmod(mode)
    assert SCHEDULES in line and "ermission" in line
    assert contents(plain_tree) == before


def test_a_failure_while_writing_leaves_every_file_as_it_was(
    plain_tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, name: str) -> None:
        raise OSError(28, "No space left on device")

    before = contents(plain_tree)
    monkeypatch.setattr(shutil, "copymode", full)
    line = refusal("apply", plain_tree, capsys)
    assert SCHEDULES in line and "No space left" in line
    assert contents(plain_tree) == before


def test_mode_is_kept_and_a_file_shared_by_links_is_not_written_through(
    plain_tree: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, cache = plain_tree / SCHEDULES, tmp_path / "cache.py"
    path.chmod(0o640)
    os.link(path, cache)
    stock = cache.read_bytes()
    patch("apply", plain_tree, capsys)
    assert path.stat().st_mode & 0o777 == 0o640
    assert cache.read_bytes() == stock != path.read_bytes()


FIRST = "--- a/{0}\n+++ b/{0}\n@@ -1 +1 @@\n-zero\n+one\n"
SECOND = "diff --git a/{0} b/{0}\n--- a/{0}\n+++ b/{0}\n@@ -1 +1 @@\n-one\n+two\n"


@pytest.fixture
def two_patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(a tree, the file in it that two patches change one after the other).

    Temporary files lie in a repository that ignores them, where git skips the second patch, which
    is in its own format, unless it is kept from finding that repository.
    """
    repository = tmp_path / "repository"
    (repository / "temporary").mkdir(parents=True)
    subprocess.run(["git", "init", "--quiet", str(repository)], check=True)
    (repository / ".gitignore").write_text("*\n")
    monkeypatch.setattr("tempfile.tempdir", str(repository / "temporary"))
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(repository))

    tree = make_tree(tmp_path / "tree")
    name = "megatron/core/number.txt"
    (tree / name).write_text("zero\n")
    patches = [tmp_path / "1.patch", tmp_path / "2.patch"]
    for path, text in zip(patches, (FIRST, SECOND), strict=True):
        path.write_text(text.format(name))
    monkeypatch.setattr(patch_command, "find_patches", lambda version: patches)
    return tree, tree / name


def test_patches_build_on_each_other(
    two_patches: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tree, file = two_patches
    patch("apply", tree, capsys)
    assert file.read_text() == "two\n"
    assert patch("check", tree, capsys) == "already applied"
    patch("reverse", tree, capsys)
    assert file.read_text() == "zero\n"


def test_a_patch_that_is_in_already_is_no_obstacle_to_the_next(
    two_patches: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tree, file = two_patches
    file.write_text("one\n")
    assert patch("check", tree, capsys) == "applies"
    patch("apply", tree, capsys)
    assert file.read_text() == "two\n"


def test_one_patch_that_does_not_fit_keeps_all_out(
    two_patches: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    tree, file = two_patches
    second = patch_command.find_patches(VERSION)[1]
    second.write_text(second.read_text().replace("-one", "-three"))
    assert second.name in refusal("apply", tree, capsys)
    assert file.read_text() == "zero\n"


def test_patches_are_found_in_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patch_command, "__file__", str(tmp_path / "lib/package/patch_command.py"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"data": str(tmp_path)}[name])
    with pytest.raises(patch_command.PatchError, match="install megatron_rlhfuse again"):
        patch_command.find_patches(VERSION)
    shutil.copytree(ROOT / "patches", tmp_path / "share/megatron_rlhfuse/patches")
    assert [path.name for path in patch_command.find_patches(VERSION)] == [PATCH.name]


def test_a_patched_megatron_leads_lists_to_the_fused_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(
        installed_file("megatron/core"),
        tmp_path / "megatron/core",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    patch("apply", tmp_path, capsys)
    script = """
import importlib, sys, types
from megatron.core.pipeline_parallel import schedules
import megatron_rlhfuse

STOCK = "forward_backward_pipelining_without_interleaving"
def schedule():
    setattr(schedules, STOCK, lambda **given: ("stock", given))
    return schedules.get_forward_backward_func(pp_size=2, vp_size=None)

fused = types.ModuleType("megatron_rlhfuse.pipeline.forward_backward")
fused.fused_forward_backward = lambda **given: ("fused", given)
sys.modules[fused.__name__] = fused
print(schedules.__file__)
print(schedule()(forward_step_func=[1, 2], model=[3, 4]))
print(schedule()(forward_step_func=1, model=3))
before = schedules.get_forward_backward_func
megatron_rlhfuse.install()
print(schedules.get_forward_backward_func is before)
sys.modules["megatron_rlhfuse.hook"] = None  # as if the package were not there
importlib.reload(schedules)
print(schedules.get_forward_backward_func(2) is getattr(schedules, STOCK))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "NO_VCS_VERSION": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-5:] == [
        str(tmp_path / SCHEDULES),
        "('fused', {'forward_step_func': [1, 2], 'model': [3, 4]})",
        "('stock', {'forward_step_func': 1, 'model': 3})",
        "True",
        "True",
    ]
