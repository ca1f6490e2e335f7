"""The checks of test_models_weights.py, as they run on every rank; the tests judge the results."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhfuse.pipeline.groups import Layout
from tests.distributed.model_helpers import (
    KINDS,
    VOCABULARY,
    Built,
    gather_columns,
    make_hf_model,
    megatron_args,
    seed_megatron,
)

LAYOUTS = {
    "pp1": Layout.blocks(4, 1, 1),
    "pp2": Layout.contiguous(4, 1, 2),
    "tp2": Layout.blocks(4, 2, 1),
    "pp2tp2": Layout.contiguous(4, 2, 2),
    "reversed": Layout((((3,), (1,)),)),  # from a high rank to a low one; ranks 0 and 2 idle
}


def check_weights(folder: str) -> dict[str, Any]:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(2, 2)
    seed_megatron()
    root = Path(folder)
    checks = _Checks(root)
    return {
        "mpu": _own_groups(LAYOUTS["pp2tp2"]) == _mpu_groups(),
        "language": {kind: checks.language(kind) for kind in KINDS},
        "scalar": {kind: checks.scalar(kind) for kind in ("llama", "qwen2")},
        "stream": checks.stream_between_layouts("qwen2"),
        "checkpoint": checks.checkpoint_between_layouts("llama"),
        "saved": checks.save("llama"),
        "reads": checks.bytes_read("qwen3"),
        "bfloat16": checks.bfloat16("llama"),
    }


def _own_groups(layout: Layout) -> dict[str, list[int]]:
    from megatron_rlhfuse.pipeline.groups import build_process_groups

    groups = build_process_groups(layout, "like-mpu")
    assert groups is not None
    names = ("tp", "pp", "dp", "mp", "embd", "pos_embd", "dp_cp", "tp_dp_cp", "intra_dist_opt")
    found = {name: getattr(groups.pgc, name) for name in names}
    return {k: dist.get_process_group_ranks(g) for k, g in found.items() if g is not None}


def _mpu_groups() -> dict[str, list[int]]:
    from megatron.core.process_groups_config import ProcessGroupCollection

    names = ["tp", "pp", "dp", "mp", "embd", "pos_embd", "dp_cp", "tp_dp_cp", "intra_dist_opt"]
    groups = ProcessGroupCollection.use_mpu_process_groups(names)
    found = {name: getattr(groups, name) for name in names}
    return {k: dist.get_process_group_ranks(g) for k, g in found.items() if g is not None}


class _Checks:
    def __init__(self, root: Path) -> None:
        self.root, self.args = root, megatron_args()
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, VOCABULARY, (2, 40), generator=generator)

    def build(
        self, kind: str, head: Any, layout: str, stored: str = "", load: bool = True
    ) -> Built:
        folder = self.root / f"{kind}-{stored or head}"
        return Built(self.args, folder, head, LAYOUTS[layout], load)

    def reference(self, kind: str, head: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Outputs for every token and state dict, computed by transformers on rank 0."""
        folder = self.root / f"{kind}-{head}"
        if dist.get_rank() == 0:
            model = make_hf_model(kind, head, folder)
            (folder / "tokenizer.json").write_text('{"a": 1}')
            with torch.no_grad():
                hidden = model.model(self.tokens).last_hidden_state
                output = (model.lm_head if head == "language" else model.score)(hidden)
                # The library's own answer for a whole sequence is the value of its last token.
                whole = model(self.tokens[:1]).logits[0]
            assert torch.equal(whole[-1] if head == "language" else whole, output[0, -1])
            torch.save((output, model.state_dict()), folder / "reference.pt")
        dist.barrier()
        return torch.load(folder / "reference.pt")

    def language(self, kind: str) -> dict[str, Any]:
        expected, state = self.reference(kind, "language")
        if KINDS[kind][1].get("tie_word_embeddings"):
            del state["lm_head.weight"]
        results: dict[str, Any] = {}
        for name in LAYOUTS:
            built = self.build(kind, "language", name)
            difference = None
            if built.model is not None and (out := self.forward(built)) is not None:
                assert built.groups is not None
                logits = gather_columns(out, built.groups.pgc.tp)[..., :VOCABULARY]
                difference = (logits - expected).abs().max().item()
            results[name] = {"difference": difference, "wrong": _wrong(self.stream(built), state)}
        return results

    def scalar(self, kind: str) -> dict[str, Any]:
        expected, state = self.reference(kind, "scalar")
        results: dict[str, Any] = {}
        for name in LAYOUTS:
            built = self.build(kind, "scalar", name)
            fresh = self.build(kind, "scalar", name, stored="language")
            difference = start = None
            if built.model is not None and (out := self.forward(built)) is not None:
                assert out.dtype == torch.float32
                difference = (out - expected).abs().max().item()
            if fresh.model is not None and (out := self.forward(fresh)) is not None:
                start = out.abs().max().item()
            wrong = _wrong(self.stream(built), state)
            results[name] = {"difference": difference, "start": start, "wrong": wrong}
        return results

    def forward(self, built: Built) -> Tensor | None:
        with torch.no_grad():
            outputs = built.run([self.tokens])
        return outputs[0] if outputs else None

    def stream(self, built: Built) -> Iterator[tuple[str, Tensor]]:
        from megatron_rlhfuse.models.export import stream_hf_weights

        return stream_hf_weights(built.model, built.shape, built.layout, torch.float32)

    def stream_between_layouts(self, kind: str) -> dict[str, bool]:
        from megatron_rlhfuse.models.load import load_stream

        results = {}
        for source, target in (("pp2", "tp2"), ("pp2tp2", "pp1"), ("tp2", "reversed")):
            old = self.build(kind, "language", source)
            new = self.build(kind, "language", target, load=False)
            loaded = self.build(kind, "language", target)
            load_stream(new.model, self.stream(old), new.shape, new.groups)
            results[f"{source} to {target}"] = _same(new.model, loaded.model)
        return results

    def checkpoint_between_layouts(self, kind: str) -> bool:
        from megatron.core import dist_checkpointing

        folder = self.root / "checkpoint"
        if dist.get_rank() == 0:
            folder.mkdir()
        dist.barrier()
        old = self.build(kind, "scalar", "pp2")
        new = self.build(kind, "scalar", "tp2", load=False)
        loaded = self.build(kind, "scalar", "tp2")

        def state(built: Built) -> Any:
            assert built.groups is not None
            metadata = {"dp_cp_group": built.groups.pgc.dp_cp}
            return built.model.sharded_state_dict(prefix="critic.", metadata=metadata)

        dist_checkpointing.save(state(old), str(folder))
        found = dist_checkpointing.load(state(new), str(folder))
        new.model.load_state_dict({k.removeprefix("critic."): v for k, v in found.items()})
        return _same(new.model, loaded.model)

    def save(self, kind: str) -> dict[str, Any]:
        """Saves a language model in two files, and a critic that started from it."""
        from megatron_rlhfuse.models.save import save_hf

        source, writes = self.root / f"{kind}-language", dist.get_rank() == 0
        language = self.build(kind, "language", "pp2tp2")
        critic = self.build(kind, "scalar", "pp2tp2", stored="language")
        for built, name, limit in ((language, "saved", 400_000), (critic, "critic", 1 << 30)):
            save_hf(self.root / name, source, self.stream(built), writes, limit)
        if not writes:
            return {}
        import transformers

        with torch.no_grad():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                self.root / "saved", attn_implementation="eager"
            )
            expected = torch.load(source / "reference.pt")[0]
            auto = transformers.AutoModelForSequenceClassification
            values = auto.from_pretrained(self.root / "critic")(self.tokens[:1]).logits
            return {
                "equal": torch.equal(model(self.tokens).logits, expected),
                "files": sorted(path.name for path in (self.root / "saved").iterdir()),
                "values": values.tolist(),
                "left": [path.name for path in self.root.iterdir() if path.name[0] == "."],
            }

    def bytes_read(self, kind: str) -> dict[str, int]:
        """What one rank of TP 2 x PP 2 reads from files, against what it holds."""
        from megatron_rlhfuse.models import load

        read = 0

        class Spy:
            def __init__(self, inner: Any) -> None:
                self.inner = inner

            def __getitem__(self, index: Any) -> Tensor:
                nonlocal read
                piece = self.inner[index]
                read += piece.nbytes
                return piece

            def get_shape(self) -> Any:
                return self.inner.get_shape()

        class SpyFile:
            def __init__(self, path: Path) -> None:
                self.file = plain(path)

            def __enter__(self) -> SpyFile:
                self.file.__enter__()
                return self

            def __exit__(self, *error: Any) -> None:
                self.file.__exit__(*error)

            def get_slice(self, name: str) -> Spy:
                return Spy(self.file.get_slice(name))

        plain, load._open = load._open, SpyFile
        try:
            built = self.build(kind, "language", "pp2tp2")
        finally:
            load._open = plain
        holds = sum(parameter.nbytes for parameter in built.model.parameters())
        return {"read": read, "holds": holds}

    def bfloat16(self, kind: str) -> dict[str, Any]:
        """bf16 parameters are the rounded float32 ones, and stream out as either dtype."""
        from megatron_rlhfuse.models.export import stream_hf_weights

        _, state = torch.load(self.root / f"{kind}-language" / "reference.pt")
        rounded = {name: tensor.bfloat16() for name, tensor in state.items()}
        self.args = megatron_args("--bf16")
        built = self.build(kind, "language", "pp2tp2")
        as_float = stream_hf_weights(built.model, built.shape, built.layout, torch.float32)
        result: dict[str, Any] = {
            "dtypes": sorted({str(p.dtype) for p in built.model.parameters()}),
            "wrong": _wrong(as_float, {name: tensor.float() for name, tensor in rounded.items()}),
        }
        output = self.forward(built)
        self.args = megatron_args()
        return {**result, "output": str(output.dtype) if output is not None else None}


def _wrong(stream: Iterator[tuple[str, Tensor]], expected: dict[str, Tensor]) -> list[str]:
    """Names that a stream gives wrongly, twice, not at all or too many."""
    left, wrong = dict(expected), []
    for name, tensor in stream:
        if name not in left or not torch.equal(tensor, left.pop(name)):
            wrong.append(name)
    return wrong + list(left)


def _same(model: Any, other: Any) -> bool:
    if model is None:
        return other is None
    pairs = zip(model.named_parameters(), other.named_parameters(), strict=True)
    return all(n == m and torch.equal(p, q) for (n, p), (m, q) in pairs)
