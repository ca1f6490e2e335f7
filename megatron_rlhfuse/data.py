"""Prompts of the run: read from JSON lines, tokenized once, drawn in an order that a seed decides.

Invariants:
- a line that cannot be used is refused with its file and line number; only blank lines are skipped;
- a prompt holds the beginning-of-sequence token once where the tokenizer has one, and never ends
  in an end-of-sequence token that its text does not hold;
- epoch e of the sampler is a permutation that depends on (seed, e, number of prompts) alone, so a
  position is all that a checkpoint needs, and a batch may cross the border of two epochs.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError

DATA_FLAG = "--prompt-data"
LIMIT_FLAG = "--rollout-max-prompt-tokens"
OVERLONG_FLAG = "--rollout-overlong-prompts"


@dataclass(frozen=True)
class Prompt:
    """One usable line of the prompt files."""

    index: int
    """Position in the data set: what `PromptSampler` draws."""
    token_ids: tuple[int, ...]
    text: str
    """What was tokenized: the `prompt` itself, or the rendered `messages`."""
    fields: Mapping[str, Any]
    """All other fields of the line, for a reward function (say, the expected answer)."""


class PromptDataset:
    """All prompts of some JSON-lines files, in file order.

    A line is `{"prompt": "..."}`, tokenized with the tokenizer's own special tokens, or
    `{"messages": [{"role": ..., "content": ...}, ...]}`, rendered by its chat template with
    `add_generation_prompt=True`; a template writes the special tokens itself, so none is added.

    Raises ValueError, naming file and line or the flag at fault, for a file or line that cannot be
    used, for a prompt of more than `max_prompt_tokens` when `overlong` is "refuse" (with "drop" it
    is left out and counted in `dropped`), and when no prompt is left.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        tokenizer: Any,
        max_prompt_tokens: int,
        overlong: Literal["drop", "refuse"] = "drop",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if overlong not in ("drop", "refuse"):
            raise ValueError(f"{OVERLONG_FLAG} is {overlong!r}; it must be drop or refuse")
        self.dropped = 0
        self._prompts: list[Prompt] = []
        self._tokenizer = tokenizer
        self._template_kwargs = dict(chat_template_kwargs or {})
        for path in paths:
            for where, line in _lines(Path(path)):
                text, token_ids, fields = self._parse(line, where)
                if not token_ids:
                    raise ValueError(f"{where}: the tokenizer makes no token of {text[:80]!r}")
                if len(token_ids) <= max_prompt_tokens:
                    index = len(self._prompts)
                    self._prompts.append(Prompt(index, tuple(token_ids), text, fields))
                elif overlong == "drop":
                    self.dropped += 1
                else:
                    raise ValueError(
                        f"{where}: the prompt has {len(token_ids)} tokens, more than {LIMIT_FLAG} "
                        f"{max_prompt_tokens}; shorten it, raise {LIMIT_FLAG}, or leave such "
                        f"prompts out with {OVERLONG_FLAG} drop"
                    )
        if not self._prompts:
            raise ValueError(
                f"{DATA_FLAG}: no prompt in {', '.join(map(str, paths)) or 'no file'} "
                f"({self.dropped} left out for being longer than {LIMIT_FLAG} {max_prompt_tokens})"
            )

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def digest(self) -> str:
        """Identifies the prompts and their order: what a resumed run must agree on."""
        digest = hashlib.sha256()
        for prompt in self._prompts:
            digest.update(json.dumps(prompt.token_ids).encode())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> Prompt:
        return self._prompts[index]

    def _parse(self, line: bytes, where: str) -> tuple[str, list[int], dict[str, Any]]:
        """Text, tokens and other fields of one line."""
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            raise ValueError(f"{where}: not a line of JSON in UTF-8: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a line must be a JSON object, not {_json_type(record)}")
        if ("prompt" in record) == ("messages" in record):
            held = "both" if "prompt" in record else "neither"
            raise ValueError(
                f"{where}: a line holds either 'prompt' or 'messages'; this one holds {held}"
            )
        plain = "prompt" in record
        text = record.pop("prompt") if plain else self._render(record.pop("messages"), where)
        if not isinstance(text, str):
            raise ValueError(f"{where}: 'prompt' must be a string, not {_json_type(text)}")
        if not text.strip():
            raise ValueError(f"{where}: {"'prompt'" if plain else 'the rendered chat'} is empty")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
            raise ValueError(f"{where}: the text is not valid Unicode: {error}") from error
        if plain:
            return text, self._tokenize_plain(text), record
        return text, self._tokenizer.encode(text, add_special_tokens=False), record

    def _tokenize_plain(self, text: str) -> list[int]:
        """Tokens of `text` with the tokenizer's special tokens, but no second bos and no eos."""
        bare = self._tokenizer.encode(text, add_special_tokens=False)
        full = self._tokenizer.encode(text, add_special_tokens=True)
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if bos is not None and bare[:1] == [bos]:  # written out in the text
            return bare
        added_eos = eos is not None and full[-1:] == [eos] and full.count(eos) > bare.count(eos)
        return full[:-1] if added_eos else full

    def _render(self, messages: Any, where: str) -> str:
        """The chat template's text for `messages`, up to where the answer begins."""
        if not isinstance(messages, list):
            raise ValueError(f"{where}: 'messages' must be a list, not {_json_type(messages)}")
        if not messages:
            raise ValueError(f"{where}: 'messages' is empty")
        for number, message in enumerate(messages):
            if not isinstance(message, dict):
                raise ValueError(
                    f"{where}: messages[{number}] must be an object, not {_json_type(message)}"
                )
            for field in ("role", "content"):
                if not isinstance(message.get(field), str):
                    raise ValueError(f"{where}: messages[{number}].{field} must be a string")
        if not getattr(self._tokenizer, "chat_template", None):
            raise ValueError(
                f"{where}: the tokenizer has no chat template, so 'messages' cannot be rendered; "
                f"write the whole text as 'prompt', or put a chat_template.jinja into the "
                f"tokenizer's folder"
            )
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self._template_kwargs
            )
        except TemplateError as error:
            raise ValueError(f"{where}: the chat template refuses 'messages': {error}") from error


class PromptSampler:
    """Which prompts each iteration takes: `batch_size` indices below `dataset_size` at a time.

    Every epoch visits each prompt exactly once, in file order with `shuffle=False`. Batches follow
    each other through the epochs without a gap. The state is the number of prompts drawn, so a
    resumed run may change its batch size.
    """

    def __init__(self, dataset_size: int, batch_size: int, seed: int, shuffle: bool = True) -> None:
        if dataset_size < 1:
            raise ValueError(f"{DATA_FLAG}: the data set is empty")
        if batch_size < 1:
            raise ValueError(f"an iteration must take at least 1 prompt, not {batch_size}")
        self._dataset_size = dataset_size
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._position = 0
        self._order: tuple[int, list[int]] | None = None  # (epoch, its permutation)

    @property
    def batch_size(self) -> int:
        """Prompts of an iteration."""
        return self._batch_size

    @property
    def position(self) -> int:
        """Prompts drawn since the run began."""
        return self._position

    @property
    def epoch(self) -> int:
        """Epoch of the next prompt, from 0."""
        return self._position // self._dataset_size

    def next_batch(self, count: int | None = None) -> list[int]:
        """Indices of the next `batch_size` prompts, or of `count`."""
        batch = []
        for _ in range(self._batch_size if count is None else count):
            batch.append(self._epoch_order(self.epoch)[self._position % self._dataset_size])
            self._position += 1
        return batch

    def state_dict(self) -> dict[str, int | bool]:
        """The data position and what it is only valid with."""
        return {
            "position": self._position,
            "dataset_size": self._dataset_size,
            "seed": self._seed,
            "shuffle": self._shuffle,
        }

    def load_state_dict(self, state: Mapping[str, int | bool]) -> None:
        """Continues at a saved position. Raises ValueError when the prompts' order has changed."""
        for field, current, remedy in (
            ("dataset_size", self._dataset_size, f"resume with the files of {DATA_FLAG} unchanged"),
            ("seed", self._seed, "resume with the --seed it was started with"),
            ("shuffle", self._shuffle, "resume with the same choice"),
        ):
            if state[field] != current:
                raise ValueError(
                    f"the data position of the checkpoint does not fit: its {field} is "
                    f"{state[field]}, this run's is {current}; {remedy}"
                )
        self._position = int(state["position"])

    def _epoch_order(self, epoch: int) -> list[int]:
        """The permutation of one epoch; a string seeds Python's generator through SHA-512."""
        if self._order is None or self._order[0] != epoch:
            order = list(range(self._dataset_size))
            if self._shuffle:
                random.Random(f"prompts/{self._seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1]


def _lines(path: Path) -> list[tuple[str, bytes]]:
    """("file:line", content) of every line that is not blank."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{DATA_FLAG}: cannot read {path}: {error.strerror}") from error
    numbered = enumerate(content.split(b"\n"), start=1)
    return [(f"{path}:{number}", line) for number, line in numbered if line.strip()]


def _json_type(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
