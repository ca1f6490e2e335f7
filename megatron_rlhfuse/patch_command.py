"""Patches a Megatron-LM tree for fused training, or takes the patches out again.

Invariants
- All patches of a version go in, or none: they are tried by `git apply` on copies of the files
  they touch, and the tree is written only after every one of them has fitted.
- A file of the tree is replaced as a whole, so it is never half written, and a file that shares
  its storage with others (hard links of a package cache) leaves those as they were.
- Megatron is not imported: its version is read from its source.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

from megatron_rlhfuse.cli import Refuse
from megatron_rlhfuse.schedule.errors import escape

INFO = Path("megatron/core/package_info.py")
PREFIX = "megatron-core-"
"""Patches of one version lie in a folder of this name followed by the version."""


class PatchError(Exception):
    """Why a tree cannot be patched, in one line that names the file or flag at fault."""


class Outcome(NamedTuple):
    """What patching comes to: the new text of each file that changes; empty if it is done."""

    version: str
    changed: dict[Path, bytes]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    action = parser.add_mutually_exclusive_group(required=True)
    for name, text in (
        ("check", "say whether the patches fit, and change nothing"),
        ("apply", "put them in"),
        ("reverse", "take them out"),
    ):
        action.add_argument(f"--{name}", dest="action", action="store_const", const=name, help=text)
    parser.add_argument(
        "path", metavar="PATH", help="root of a Megatron-LM tree, or a site-packages folder"
    )


def run(args: argparse.Namespace, refuse: Refuse) -> int:
    """Prints one line that says what was found or done."""
    reverse = args.action == "reverse"
    try:
        root = find_root(Path(args.path))
        version, changed = try_patches(root, reverse)
        if args.action != "check":
            replace(changed)
    except (PatchError, OSError) as error:  # OSError: of the folder for temporary files
        refuse(str(error))
    tree = f"{escape(str(root))} (megatron-core {version})"
    if args.action == "check":
        print(f"{tree}: {'applies' if changed else 'already applied'}")
    elif not changed:
        print(f"{tree}: {'not patched' if reverse else 'already applied'}, nothing to do")
    else:
        files = ", ".join(str(path.relative_to(root)) for path in changed)
        print(f"{tree}: {'took the patches out of' if reverse else 'patched'} {files}")
    return 0


def find_root(path: Path) -> Path:
    """The folder that holds `megatron/`: `path`, or its parent where `path` is that folder."""
    try:
        resolved = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise PatchError(f"PATH {path}: {_reason(error)}") from None
    candidates = [resolved, resolved.parent] if resolved.name == INFO.parts[0] else [resolved]
    for root in candidates:
        if (root / INFO).is_file():
            return root
    raise PatchError(
        f"PATH {path} holds no {INFO}: give the root of a Megatron-LM tree or a site-packages "
        "folder"
    )


def read_version(root: Path) -> str:
    """The version of Megatron-Core in a tree, as "0.19.2" or "0.20.0rc1"."""
    path = root / INFO
    wanted = {"MAJOR", "MINOR", "PATCH", "PRE_RELEASE"}
    values: dict[str, object] = {}
    try:
        statements = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError) as error:
        raise PatchError(f"{path}: cannot be read: {_reason(error)}") from None
    for statement in statements:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
            for target in statement.targets:
                if isinstance(target, ast.Name) and target.id in wanted:
                    values[target.id] = statement.value.value
    if missing := wanted - values.keys():
        raise PatchError(f"{path}: sets no {', '.join(sorted(missing))}, so its version is unknown")
    return "{MAJOR}.{MINOR}.{PATCH}{PRE_RELEASE}".format(**values)


def find_patches(version: str) -> list[Path]:
    """The patches of a Megatron-Core version, in the order in which they are applied."""
    places = [
        Path(__file__).resolve().parents[1] / "patches",  # a checkout
        Path(sysconfig.get_path("data")) / "share/megatron_rlhfuse/patches",
    ]
    for place in places:
        if supported := sorted(folder.name for folder in place.glob(f"{PREFIX}*")):
            break
    else:
        raise PatchError(
            f"no patches in {' or '.join(map(str, places))}: install megatron_rlhfuse again"
        )
    if PREFIX + version not in supported:
        known = ", ".join(name.removeprefix(PREFIX) for name in supported)
        raise PatchError(f"no patches for megatron-core {version}: there are some for {known}")
    return sorted((place / (PREFIX + version)).glob("*.patch"))


def try_patches(root: Path, reverse: bool) -> Outcome:
    """What the tree's files become when every patch is in (or out); writes nothing there."""
    version = read_version(root)
    patches = find_patches(version)
    if shutil.which("git") is None:
        raise PatchError("git is not on PATH: install it, its `git apply` does the patching")
    with tempfile.TemporaryDirectory(prefix="rlhfuse-patch-") as name:
        copy = Path(name).resolve()
        files = {file for patch in patches for file in _files_of(patch, copy)}
        before = {file: _copy(root / file, copy / file) for file in sorted(files)}
        # A patch comes out where it is in. Whether the rest is as it should be, half a patch for
        # instance, shows when all go in, which is why that is tried for --reverse too.
        for patch in reversed(patches):
            _git_apply(copy, patch, reverse=True)
        after = {file: (copy / file).read_bytes() for file in before}
        for patch in patches:
            if fault := _git_apply(copy, patch):
                raise PatchError(
                    f"{patch.name} does not fit {root} ({fault}): the file is not as in "
                    f"megatron-core {version} there; restore it, or edit it as {patch} says"
                )
        if not reverse:
            after = {file: (copy / file).read_bytes() for file in before}
    changed = {root / file: new for file, new in after.items() if new != before[file]}
    return Outcome(version, changed)


def replace(contents: dict[Path, bytes]) -> None:
    """Replaces files. All new ones are written beside the old before the first takes its place."""
    written: dict[Path, Path] = {}
    path = Path()
    try:
        for path, content in contents.items():
            if not os.access(path, os.W_OK):  # the folder's owner could replace it all the same
                raise PermissionError(None, "no permission to write")
            descriptor, name = tempfile.mkstemp(prefix=".rlhfuse-", dir=path.parent)
            written[path] = Path(name)
            with open(descriptor, "wb") as file:
                file.write(content)
            shutil.copymode(path, name)
        for path, new in written.items():
            new.replace(path)
    except OSError as error:
        raise PatchError(f"{path}: cannot be replaced: {_reason(error)}") from None
    finally:
        for new in written.values():
            new.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> bytes:
    """Copies a file of the tree and returns its content."""
    try:
        content = source.read_bytes()
    except OSError as error:
        raise PatchError(f"{source}: cannot be read: {_reason(error)}") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    return content


def _files_of(patch: Path, folder: Path) -> list[Path]:
    """The files that a patch touches, relative to the tree's root."""
    listing = _git(folder, "--numstat", str(patch))
    files = [Path(line.split("\t")[2]) for line in listing.stdout.splitlines()]
    if not files:
        raise PatchError(f"{patch}: git finds no change in it: {_last_line(listing.stderr)}")
    return files


def _git_apply(folder: Path, patch: Path, reverse: bool = False) -> str | None:
    """Applies a patch in `folder`. Where it does not fit: changes nothing, returns git's reason."""
    done = _git(folder, *(["--reverse"] if reverse else []), str(patch))
    if done.returncode == 0:
        return None
    places = [line for line in done.stderr.splitlines() if "patch failed" in line]
    return _last_line("\n".join(places) or done.stderr).removeprefix("error: ")


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `git apply` in a folder, out of reach of any repository and of the user's settings.

    In a subfolder of a repository, an ignored one too, git takes the file names of a patch in its
    own format as relative to the repository's root: it would do nothing and end with status 0.
    """
    environment = {name: text for name, text in os.environ.items() if not name.startswith("GIT_")}
    environment |= {
        "GIT_CEILING_DIRECTORIES": str(folder.parent),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "LC_ALL": "C",
    }
    command = ["git", "apply", "--whitespace=nowarn", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]
