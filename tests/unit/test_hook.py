"""The hook into Megatron: who gets which schedule, and that installing reaches everybody."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import megatron_rlhfuse
from megatron_rlhfuse import hook

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Stands for the module of the fused pipeline; returns its name and what it was given."""
    stub = types.ModuleType("megatron_rlhfuse.pipeline.forward_backward")
    stub.fused_forward_backward = lambda **given: ("fused", given)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    return stub


@pytest.fixture
def schedules() -> Iterator[types.ModuleType]:
    """Megatron's module, with whatever a test installs taken out again afterwards."""
    from megatron.core.pipeline_parallel import schedules

    original = schedules.get_forward_backward_func
    yield schedules
    hook._rebind(schedules.get_forward_backward_func, original)


def stock(*args: Any, **given: Any) -> Any:
    """A schedule."""
    return "stock", args, given


def run_python(script: str) -> str:
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("pair", [["actor", "critic"], ("actor", "critic")])
def test_a_list_of_forward_steps_goes_to_the_fused_pipeline(pair: Any) -> None:
    given = {"forward_step_func": pair, "model": [1, 2], "forward_only": True}
    assert hook.with_fusion(stock)(**given) == ("fused", given)


@pytest.mark.parametrize(
    "given", [{"forward_step_func": len, "model": [1, 2], "num_microbatches": 4}, {}]
)
def test_any_other_call_goes_to_the_stock_schedule_as_it_is(given: dict[str, Any]) -> None:
    assert hook.with_fusion(stock)(7, **given) == ("stock", (7,), given)


def test_a_wrapped_function_keeps_its_name_and_is_not_wrapped_again() -> None:
    once = hook.with_fusion(stock)
    assert (once.__name__, once.__doc__) == ("stock", "A schedule.")
    assert hook.with_fusion(once) is once


def test_install_reaches_every_module_that_has_the_function(
    schedules: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = schedules.get_forward_backward_func
    script = types.ModuleType("script")
    vars(script).update(get_forward_backward_func=original, choose=original, other=stock)
    monkeypatch.setitem(sys.modules, "script", script)
    monkeypatch.setitem(sys.modules, "no module at all", object())  # type: ignore[arg-type]
    monkeypatch.setattr(schedules, "forward_backward_no_pipelining", stock)

    megatron_rlhfuse.install()

    from megatron.core.pipeline_parallel import get_forward_backward_func

    installed = schedules.get_forward_backward_func
    assert installed is not original
    assert get_forward_backward_func is installed
    assert vars(script)["get_forward_backward_func"] is vars(script)["choose"] is installed
    assert vars(script)["other"] is stock
    schedule = installed(pp_size=1, vp_size=None)
    assert schedule(forward_step_func=len, model=3) == (
        "stock",
        (),
        {"forward_step_func": len, "model": 3},
    )
    assert schedule(forward_step_func=[len, len])[0] == "fused"


def test_installing_again_changes_nothing(schedules: types.ModuleType) -> None:
    hook.install()
    once = schedules.get_forward_backward_func
    hook.install()
    assert schedules.get_forward_backward_func is once


def test_install_leaves_a_patched_tree_alone(
    schedules: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = schedules.get_forward_backward_func
    monkeypatch.setattr(schedules, "with_fusion", hook.with_fusion, raising=False)
    hook.install()
    assert schedules.get_forward_backward_func is original


def test_install_acts_where_the_patched_tree_did_not_find_the_package(
    schedules: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedules, "with_fusion", lambda function: function, raising=False)
    hook.install()
    assert schedules.get_forward_backward_func(1)(forward_step_func=[1, 2])[0] == "fused"


def test_install_does_not_load_a_module_that_waits_for_its_first_use(
    schedules: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "waiting.py"
    path.write_text("raise SystemExit('loaded')\n")
    spec = importlib.util.spec_from_file_location("waiting", path)
    assert spec is not None and spec.loader is not None
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "waiting", module)
    spec.loader.exec_module(module)
    hook.install()


def test_megatrons_trainer_gets_the_installed_function() -> None:
    script = """
from megatron_rlhfuse import compat, install, platform
platform.prepare()
compat.apply()
from megatron.core.pipeline_parallel import schedules
from megatron.training import training
assert training.get_forward_backward_func is schedules.get_forward_backward_func
install()
assert training.get_forward_backward_func is schedules.get_forward_backward_func
print(training.get_forward_backward_func.__wrapped__.__module__)
"""
    assert run_python(script).splitlines()[-1] == "megatron.core.pipeline_parallel.schedules"


def test_importing_the_package_and_the_hook_loads_neither_torch_nor_megatron() -> None:
    script = """
import sys
import megatron_rlhfuse
from megatron_rlhfuse import install
assert {"install", "fused_forward_backward"} <= set(dir(megatron_rlhfuse))
print({"torch", "megatron", "numpy"} & set(sys.modules))
"""
    assert run_python(script) == "set()\n"


def test_the_package_exports_what_it_lists(fused: types.ModuleType) -> None:
    assert megatron_rlhfuse.install is hook.install
    assert megatron_rlhfuse.fused_forward_backward is fused.fused_forward_backward
    assert set(megatron_rlhfuse.__all__) == set(megatron_rlhfuse._MODULE_OF)
    with pytest.raises(AttributeError, match="uninstall"):
        megatron_rlhfuse.uninstall  # noqa: B018
