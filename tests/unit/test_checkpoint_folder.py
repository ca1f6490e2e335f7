"""The folder of checkpoints: which is the latest, what is removed, what errors say."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlhfuse.training import checkpoint_folder
from megatron_rlhfuse.training.checkpoint_folder import TRACKER, CheckpointError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Complete checkpoints of iterations 2, 4, 6 and 8, half of one of 10; the latest is 8."""
    for iteration in (2, 4, 6, 8, 10):
        folder = checkpoint_folder.folder_of(tmp_path, iteration)
        folder.mkdir()
        if iteration < 10:
            (folder / "integrity.json").write_text("{}")
    checkpoint_folder.make_latest(tmp_path, 8)
    return tmp_path


def iterations(root: Path) -> list[int]:
    return sorted(int(each.name.removeprefix("iter_")) for each in root.glob("iter_*"))


def test_the_latest_is_what_the_tracker_says(root: Path) -> None:
    assert checkpoint_folder.latest_checkpoint(root) == root / "iter_0000008"
    assert (root / TRACKER).read_text() == "8\n"


@pytest.mark.parametrize("text", ["", "70", "two", "-8", "8 8", "٨", "\udc80", "1e1"])
def test_a_tracker_that_names_none_is_refused_with_another_one(root: Path, text: str) -> None:
    (root / TRACKER).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError) as error:
        checkpoint_folder.latest_checkpoint(root)
    assert "names no checkpoint" in str(error.value)
    # Of a half-written one nobody can go on.
    assert str(error.value).endswith(f"write its number into {TRACKER}: 8")


def test_a_partial_checkpoint_is_removed(root: Path) -> None:
    checkpoint_folder.remove_partial(root, 10)
    assert iterations(root) == [2, 4, 6, 8]


def test_the_latest_is_never_removed_as_a_partial_one(root: Path) -> None:
    checkpoint_folder.remove_partial(root, 8)
    assert iterations(root) == [2, 4, 6, 8, 10]


def test_a_first_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "iter_0000002").mkdir()
    checkpoint_folder.remove_partial(tmp_path, 2)
    assert iterations(tmp_path) == []
    assert "there is no earlier checkpoint" in checkpoint_folder.describe(tmp_path / "not" / "yet")


@pytest.mark.parametrize(("previous", "left"), [(6, [2, 4, 8, 10]), (4, [2, 4, 6, 8, 10])])
def test_the_previous_one_goes_but_one_of_the_interval(
    root: Path, previous: int, left: list[int]
) -> None:
    """Older ones stay: they may be of a time without the flag."""
    checkpoint_folder.remove_previous(root, previous, interval=4)
    assert iterations(root) == left


def test_one_that_cannot_be_removed_stays(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "iter_0000006").rename(root / "elsewhere")
    (root / "iter_0000006").symlink_to(root / "elsewhere")
    checkpoint_folder.remove_previous(root, 6, interval=4)
    assert iterations(root) == [2, 4, 6, 8, 10] and "stays" in caplog.text
    checkpoint_folder.remove_previous(root, None, interval=4)


def test_the_number_of_the_latest(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert checkpoint_folder.latest_iteration(root) == 8
    assert checkpoint_folder.latest_iteration(tmp_path_factory.mktemp("empty")) is None


def test_errors_tell_the_room_and_the_latest(root: Path) -> None:
    assert "MB are free there; the latest checkpoint is still iter_0000008" in (
        checkpoint_folder.describe(root)
    )


@pytest.mark.parametrize(("damaged", "other"), [(8, 6), (4, 2), (2, 8)])
def test_another_one_is_an_earlier_one_where_there_is_one(
    root: Path, damaged: int, other: int
) -> None:
    folder = checkpoint_folder.folder_of(root, damaged)
    assert checkpoint_folder.another_checkpoint(folder).endswith(f"{TRACKER}: {other}")
