"""Fills this rank's part of a model: from a folder of safetensors, or from a stream of tensors.

Invariants
- Strict both ways: every parameter is filled exactly once, from a tensor of the expected shape;
  a tensor that the architecture does not have, or lacks, is an error that names it.
- From files a rank reads the slices that it keeps and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megatron_rlhfuse.models.convert import Weight, canonical_name, stage_weights
from megatron_rlhfuse.models.hf_config import ModelShape
from megatron_rlhfuse.pipeline.groups import Layout, ModelGroups, Place

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def load_hf_weights(
    model: GPTModel, folder: str | Path, shape: ModelShape, groups: ModelGroups
) -> None:
    """Fills `model` from the safetensors of a Hugging Face folder. Not collective.

    Values are converted to the parameters' dtype. A scalar head that the folder does not hold
    (a critic that starts from a language model) starts at zero: every value is 0 at first, the
    same in any layout, and the head learns before it moves the trunk.

    Raises:
        FileNotFoundError: no safetensors in the folder
        ValueError: a tensor is missing, unknown or of another shape
    """
    filler = _Filler(model, shape, groups)
    files = _tensor_files(Path(folder))
    _check_names(Path(folder), files, shape)
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        for name in filler.names:
            if name == "score.weight" and shape.stored_head == "language":
                filler.fill_zero(name)
                continue
            if files[name] not in opened:
                opened[files[name]] = stack.enter_context(_open(files[name]))
            stored = opened[files[name]].get_slice(name)
            filler.fill(name, tuple(stored.get_shape()), stored)
    filler.finish()


def load_stream(
    model: GPTModel | None,
    stream: Iterable[tuple[str, Tensor]],
    shape: ModelShape,
    groups: ModelGroups | None,
) -> None:
    """Fills `model` from whole tensors, such as `export.stream_hf_weights` yields.

    The source may have any other layout. A rank without a part passes None for model and groups:
    it drains the stream, because producing it is collective.
    """
    filler = _Filler(model, shape, groups) if model is not None and groups is not None else None
    for name, tensor in stream:
        if filler is not None and name in filler.names:
            filler.fill(name, tuple(tensor.shape), tensor)
    if filler is not None:
        filler.finish()


def stage_parameters(
    model: GPTModel, shape: ModelShape, layout: Layout, place: Place
) -> Iterator[tuple[Weight, Tensor]]:
    """The parameters of a rank beside their descriptions, in the order of the network.

    Raises:
        ValueError: the model does not have exactly the parameters, or the shapes, of `shape`
    """
    offset = place.stage * (shape.num_layers // layout.pp)
    present = {canonical_name(name, offset): p for name, p in model.named_parameters()}
    for weight in stage_weights(shape, place.stage, layout.pp):
        if weight.name not in present:
            raise ValueError(f"the model of {shape.folder} was built without {weight.name}")
        parameter = present.pop(weight.name)
        expected = weight.shard_shape(layout.tp)
        if tuple(parameter.shape) != expected:
            raise ValueError(
                f"the model of {shape.folder} was built with {weight.name} of shape "
                f"{tuple(parameter.shape)}; on {layout.tp} tensor-parallel ranks it is {expected}"
            )
        yield weight, parameter.data
    if present:
        raise ValueError(
            f"the model of {shape.folder} was built with parameters that no Hugging Face tensor "
            f"fills: {', '.join(sorted(present))}"
        )


class _Filler:
    """Fills one rank's parameters tensor by tensor and keeps the books."""

    def __init__(self, model: GPTModel, shape: ModelShape, groups: ModelGroups) -> None:
        self._shape, self._groups = shape, groups
        # A tied embedding on both ends of the network has two places to go to.
        self._open: dict[str, list[tuple[Weight, int, Tensor]]] = {}
        for weight, parameter in stage_parameters(model, shape, groups.layout, groups.place):
            if weight.padded:
                parameter.zero_()  # the padding rows: no tensor fills them
            for source, name in enumerate(weight.sources):
                self._open.setdefault(name, []).append((weight, source, parameter))
        self.names = dict.fromkeys(self._open)  # an ordered set

    def fill(self, name: str, stored_shape: tuple[int, ...], stored: Any) -> None:
        """Copies the needed slices of a tensor, given as anything that slices like one."""
        rank, size = self._groups.place.tensor, self._groups.layout.tp
        for weight, source, parameter in self._take(name):
            expected = weight.source_shape(source)
            if stored_shape != expected:
                raise ValueError(
                    f"{name} has shape {stored_shape}, but the config of {self._shape.folder} "
                    f"makes it {expected}"
                )
            view = weight.part(parameter, source, rank, size)
            if view.numel():
                piece: Tensor = stored[weight.source_slice(source, rank, size)]
                view.copy_(piece.reshape(view.shape))

    def fill_zero(self, name: str) -> None:
        for _, _, parameter in self._take(name):
            parameter.zero_()

    def finish(self) -> None:
        if self._open:
            raise ValueError(
                f"model {self._groups.name}: tensors never came: {', '.join(self._open)}"
            )

    def _take(self, name: str) -> list[tuple[Weight, int, Tensor]]:
        if name not in self._open:
            raise ValueError(f"model {self._groups.name}: tensor {name} came twice")
        return self._open.pop(name)


def _open(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework="pt", device="cpu")


def _tensor_files(folder: Path) -> Mapping[str, Path]:
    """Which file holds which tensor."""
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text())
        return {name: folder / file for name, file in index["weight_map"].items()}
    if (folder / _SINGLE).is_file():
        with _open(folder / _SINGLE) as stored:
            return dict.fromkeys(stored.keys(), folder / _SINGLE)
    raise FileNotFoundError(
        f"{folder} holds neither {_SINGLE} nor {_INDEX}: save the model as safetensors"
    )


def _check_names(folder: Path, files: Mapping[str, Path], shape: ModelShape) -> None:
    expected = {name for weight in stage_weights(shape, 0, 1) for name in weight.sources}
    optional = {"lm_head.weight"} if shape.tied_embeddings or shape.head == "scalar" else set()
    if shape.stored_head == "language":
        expected.discard("score.weight")
    missing = sorted(expected - set(files))
    # Older exports hold rotary frequencies, which follow from the config.
    present = {name for name in files if not name.endswith("rotary_emb.inv_freq")}
    unknown = sorted(present - expected - optional)
    for names, what in ((missing, "lacks"), (unknown, "has unknown")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"{folder} {what} tensors of a {shape.model_type} model with a {shape.head} head: "
                f"{', '.join(names[:3])}{more}"
            )
