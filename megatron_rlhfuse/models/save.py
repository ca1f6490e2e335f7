"""Writes a stream of Hugging Face tensors to a folder that transformers and vLLM load.

Invariants
- The folder appears whole or not at all: it is written under another name and then renamed. A
  folder of that name that was there before stays until then.
- At most `max_file_bytes`, and one tensor, are held in memory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

MAX_FILE_BYTES = 4 << 30
# What belongs to a model besides config and weights. Nothing else of the source is copied.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)


def save_hf(
    folder: str | Path,
    source_folder: str | Path,
    stream: Iterable[tuple[str, Tensor]],
    write: bool,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Saves a model with the config and tokenizer of `source_folder`. Collective as `stream` is.

    Args:
        folder: target; replaced if it exists
        write: True on the one rank that writes; the others only drain the stream
        max_file_bytes: a further file is begun before this size is exceeded
    """
    if not write:
        for _ in stream:
            pass
        return
    folder, source_folder = Path(folder), Path(source_folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        tensors = _write_tensors(partial, stream, max_file_bytes)
        _write_config(partial, source_folder, tensors)
        for pattern in _COMPANIONS:
            for path in source_folder.glob(pattern):
                if path.is_file():
                    shutil.copy2(path, partial)
        _swap_in(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_tensors(
    folder: Path, stream: Iterable[tuple[str, Tensor]], max_file_bytes: int
) -> dict[str, str]:
    """Writes the safetensors; returns the dtype of each tensor by name."""
    files: list[list[str]] = []
    dtypes: dict[str, str] = {}
    batch: dict[str, Tensor] = {}
    total = held = 0

    def flush() -> None:
        from safetensors.torch import save_file

        save_file(batch, folder / f"part-{len(files)}", metadata={"format": "pt"})
        files.append(list(batch))
        batch.clear()

    for name, tensor in stream:
        size = tensor.nbytes
        if batch and held + size > max_file_bytes:
            flush()
            held = 0
        batch[name] = tensor.cpu()
        dtypes[name] = str(tensor.dtype).removeprefix("torch.")
        held += size
        total += size
    flush()
    _name_files(folder, files, total)
    return dtypes


def _name_files(folder: Path, files: list[list[str]], total: int) -> None:
    # File names tell how many there are, which is known only now.
    if len(files) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_config(folder: Path, source_folder: Path, dtypes: dict[str, str]) -> None:
    config: dict[str, Any] = json.loads((source_folder / "config.json").read_text())
    # Loaders take the dtype from here; the older spelling is kept where the source has it.
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = dtypes["model.norm.weight"]
    if "score.weight" in dtypes:  # a critic may come from a language model's folder
        (architecture,) = config["architectures"]
        config["architectures"] = [architecture.replace("ForCausalLM", "ForSequenceClassification")]
        if len(config.get("id2label") or ()) != 1:  # transformers counts labels here; default 2
            config["id2label"], config["label2id"] = {"0": "LABEL_0"}, {"LABEL_0": 0}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _swap_in(partial: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
