"""Nothing in this project runs code that came over a port or out of a file of data."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "megatron_rlhfuse").rglob("*.py"), ROOT / "pretrain_rlhf.py"])

MODULES = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
PICKLING_COLLECTIVES = {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}

ALLOWED = {
    # A rank and its own engine, over a socket pair that only they hold.
    ("megatron_rlhfuse/rollout/child.py", "multiprocessing.connection"),
    ("megatron_rlhfuse/rollout/engine_process.py", "multiprocessing.connection"),
    # The unpickler that builds nothing but tables of contents.
    ("megatron_rlhfuse/training/safe_loading.py", "pickle"),
}


def is_true(call: ast.Call, keyword: str) -> bool:
    return any(
        each.arg == keyword and isinstance(each.value, ast.Constant) and each.value.value is True
        for each in call.keywords
    )


def faults(tree: ast.AST) -> set[str]:
    """What could run foreign code."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {n.name for n in node.names if n.name.split(".")[0] in MODULES}
            found |= {n.name for n in node.names if n.name == "multiprocessing.connection"}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.split(".")[0] in MODULES or node.module == "multiprocessing.connection":
                found.add(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            last = name.rpartition(".")[2]
            if name in BUILTINS or last in PICKLING_COLLECTIVES or name == "os.system":
                found.add(name)
            if name == "torch.load" and not is_true(node, "weights_only"):
                found.add(name)
            if is_true(node, "allow_pickle") or is_true(node, "shell"):
                found.add(name)
            if is_true(node, "trust_remote_code"):
                found.add(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_runs_what_it_reads(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert {(name, fault) for fault in faults(tree)} <= ALLOWED


def test_what_is_allowed_is_there() -> None:
    for name, fault in ALLOWED:
        assert fault in faults(ast.parse((ROOT / name).read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import yaml",
        "eval(x)",
        "exec(x)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "np.load(x, allow_pickle=True)",
        "dist.all_gather_object(a, b)",
        "subprocess.run(x, shell=True)",
        "from multiprocessing.connection import Client",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_the_look_finds_what_it_looks_for(code: str) -> None:
    assert faults(ast.parse(code))


@pytest.mark.parametrize(
    "code", ["torch.load(x, weights_only=True)", "re.compile(x)", "json.loads(x)"]
)
def test_the_look_finds_no_more(code: str) -> None:
    assert not faults(ast.parse(code))
