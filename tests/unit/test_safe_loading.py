"""A checkpoint is read as it was written, and runs nothing that it brings along."""

from __future__ import annotations

import io
import pickle
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rlhfuse.training import safe_loading

pytestmark = pytest.mark.filterwarnings("ignore")


class Trap:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.mkdir, (self.path,)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    safe_loading.install()
    folder = tmp_path / "checkpoint"
    state = {"tensor": torch.arange(6.0).reshape(2, 3), "plain": {"iteration": 3, "names": ["a"]}}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def load(folder: Path) -> dict[str, Any]:
    state = {"tensor": torch.zeros(2, 3), "plain": {"iteration": 0, "names": [""]}}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def test_what_was_saved_is_loaded(saved: Path) -> None:
    safe_loading.install()  # twice is as good as once
    state = load(saved)
    assert torch.equal(state["tensor"], torch.arange(6.0).reshape(2, 3))
    assert state["plain"] == {"iteration": 3, "names": ["a"]}


def test_a_table_of_contents_runs_nothing(saved: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (saved / ".metadata").write_bytes(pickle.dumps(Trap(ran)))
    with pytest.raises(CheckpointException, match=r"asks for pathlib.*Path.mkdir"):
        load(saved)
    assert not ran.exists()
    pickle.loads((saved / ".metadata").read_bytes())
    assert ran.exists(), "the trap itself does not work"


@pytest.mark.parametrize(
    "name", [("builtins", "eval"), ("torch", "load"), ("torch", "hub"), ("torch", "Size.__new__")]
)
def test_a_table_of_contents_names_types_of_checkpoints_only(name: tuple[str, str]) -> None:
    contents = safe_loading._TableOfContents(io.BytesIO())
    with pytest.raises(pickle.UnpicklingError, match="no checkpoint needs"):
        contents.find_class(*name)


def test_an_object_runs_nothing(tmp_path: Path) -> None:
    safe_loading.install()
    folder, ran = tmp_path / "checkpoint", tmp_path / "ran"
    dcp.save({"object": Trap(ran)}, checkpoint_id=folder, no_dist=True)
    with pytest.raises(CheckpointException, match="weights_only"):
        dcp.load({"object": 0}, checkpoint_id=folder, no_dist=True)
    assert not ran.exists()


def test_megatrons_own_types_are_known(tmp_path: Path) -> None:
    import megatron.core  # noqa: F401  # which names them to torch

    safe_loading.install()
    folder = tmp_path / "checkpoint"
    dcp.save({"args": Namespace(lr=0.5)}, checkpoint_id=folder, no_dist=True)
    state = {"args": Namespace()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    assert state["args"] == Namespace(lr=0.5)
    shutil.rmtree(folder)
