"""Prompts from JSON lines, and the order in which the sampler draws them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_rlhfuse.data import PromptDataset, PromptSampler

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant{{ suffix }}]{% endif %}"
)


def make_tokenizer(template: str | None = TEMPLATE, single: str = "<s> $A") -> Any:
    """One token a byte; `single` says which special tokens surround a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def load(tmp_path: Path, *lines: object, tokenizer: Any = None, **options: Any) -> PromptDataset:
    """The data set of one file: strings are written as they are, objects as JSON."""
    path = tmp_path / "prompts.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    options = {"max_prompt_tokens": 1000, "overlong": "refuse"} | options
    return PromptDataset([path], tokenizer or make_tokenizer(), **options)


def test_a_prompt_without_tokens_is_refused(tmp_path: Path) -> None:
    # As happens with a tokenizer whose vocabulary holds nothing of the text.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    )
    with pytest.raises(ValueError, match=r"prompts\.jsonl:2: the tokenizer makes no token of 'b'"):
        load(tmp_path, {"prompt": "a"}, {"prompt": "b"}, tokenizer=tokenizer)


def test_a_plain_prompt_keeps_its_text_tokens_and_other_fields(tmp_path: Path) -> None:
    data = load(tmp_path, {"prompt": "häh?", "answer": 4, "tags": ["a"]}, "", {"prompt": "b"})
    assert [prompt.index for prompt in (data[0], data[1])] == [0, 1]
    assert len(data) == 2 and data.dropped == 0
    assert data[0].text == "häh?"
    assert data[0].fields == {"answer": 4, "tags": ["a"]}
    tokenizer = make_tokenizer()
    assert data[0].token_ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(data[0].token_ids[1:]) == "häh?"


@pytest.mark.parametrize("single", ["<s> $A", "<s> $A </s>", "$A", "$A </s>"])
@pytest.mark.parametrize("text", ["ab", "<s>ab", "ab</s>", "<s>ab</s>"])
def test_special_tokens_are_there_once_and_eos_only_if_written(
    tmp_path: Path, single: str, text: str
) -> None:
    data = load(tmp_path, {"prompt": text}, tokenizer=make_tokenizer(single=single))
    ids = data[0].token_ids
    assert ids.count(0) == (1 if "<s>" in text + single else 0)
    assert ids.count(1) == (1 if "</s>" in text else 0)
    assert ids[-1] == 1 or "</s>" not in text


def test_messages_equal_the_prompt_that_their_template_renders(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    data = load(
        tmp_path,
        {"messages": messages, "topic": "x"},
        {"prompt": "[user] hi [assistant!]"},
        chat_template_kwargs={"suffix": "!"},
    )
    assert data[0].text == "<s>[user] hi [assistant!]"
    assert data[0].token_ids == data[1].token_ids
    assert data[0].fields == {"topic": "x"}


def test_files_follow_each_other(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        path.write_text(json.dumps({"prompt": path.stem}))  # no newline at the end
    data = PromptDataset(paths, make_tokenizer(), 10, "refuse")
    assert [data[n].text for n in range(len(data))] == ["a", "b"]


BAD_LINES = {
    "not JSON": ("{prompt: 1}", "not a line of JSON"),
    "cut": ('{"prompt": "a"', "not a line of JSON"),
    "no object": ('["a"]', "must be a JSON object, not a list"),
    "neither": ({"text": "a"}, "this one holds neither"),
    "both": ({"prompt": "a", "messages": []}, "this one holds both"),
    "prompt type": ({"prompt": 3}, "'prompt' must be a string, not a number"),
    "null prompt": ({"prompt": None}, "'prompt' must be a string, not null"),
    "empty prompt": ({"prompt": " \n"}, "'prompt' is empty"),
    "half a surrogate pair": ('{"prompt": "\\ud800"}', "not valid Unicode"),
    "messages type": ({"messages": "hi"}, "'messages' must be a list, not a string"),
    "no message": ({"messages": []}, "'messages' is empty"),
    "message type": ({"messages": ["hi"]}, "messages[0] must be an object, not a string"),
    "no role": ({"messages": [{"content": "a"}]}, "messages[0].role must be a string"),
    "content type": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": ["a"]}]},
        "messages[1].content must be a string",
    ),
    "refused by the template": (
        {"messages": [{"role": "tool", "content": "a"}]},
        "the chat template refuses 'messages': no tools here",
    ),
}


@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=list(BAD_LINES))
def test_a_bad_line_is_refused_with_file_and_line(tmp_path: Path, bad: tuple[Any, str]) -> None:
    line, message = bad
    with pytest.raises(ValueError) as refusal:
        load(tmp_path, {"prompt": "good"}, "  ", line)
    assert str(refusal.value).startswith(f"{tmp_path}/prompts.jsonl:3: ")
    assert message in str(refusal.value)


def test_a_line_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe4"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl:2: not a line of JSON in UTF-8"):
        PromptDataset([path], make_tokenizer(), 10, "refuse")


def test_messages_without_a_chat_template_are_refused_with_the_remedy(tmp_path: Path) -> None:
    line = {"messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(ValueError, match=r"jsonl:1: the tokenizer has no chat template.*'prompt'"):
        load(tmp_path, line, tokenizer=make_tokenizer(template=None))


def test_long_prompts_are_dropped_and_counted_or_refused(tmp_path: Path) -> None:
    lines = [{"prompt": "abc"}, {"prompt": "abcd"}, {"prompt": "a"}]  # 4, 5 and 2 tokens with bos
    data = load(tmp_path, *lines, max_prompt_tokens=4, overlong="drop")
    assert data.dropped == 1
    assert [(data[n].index, data[n].text) for n in range(len(data))] == [(0, "abc"), (1, "a")]
    with pytest.raises(ValueError, match=r":2: .* 5 tokens, .*--rollout-overlong-prompts drop"):
        load(tmp_path, *lines, max_prompt_tokens=4, overlong="refuse")
    with pytest.raises(ValueError, match="--rollout-overlong-prompts is 'keep'"):
        load(tmp_path, *lines, overlong="keep")


def test_an_empty_data_set_names_the_flag(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--prompt-data: no prompt in .*prompts\.jsonl"):
        load(tmp_path, "", " ")
    with pytest.raises(ValueError, match=r"--prompt-data: no prompt in .*\(1 left out"):
        load(tmp_path, {"prompt": "abc"}, max_prompt_tokens=1, overlong="drop")
    with pytest.raises(ValueError, match="--prompt-data: no prompt in no file"):
        PromptDataset([], make_tokenizer(), 10)
    with pytest.raises(ValueError, match=r"--prompt-data: cannot read .*absent"):
        PromptDataset([tmp_path / "absent"], make_tokenizer(), 10)


sizes = st.integers(1, 12)
seeds = st.integers(0, 2**32)


@given(size=sizes, batch_size=sizes, seed=seeds, shuffle=st.booleans(), epochs=st.integers(1, 4))
def test_every_epoch_visits_each_prompt_once_across_batches(
    size: int, batch_size: int, seed: int, shuffle: bool, epochs: int
) -> None:
    sampler = PromptSampler(size, batch_size, seed, shuffle)
    drawn: list[int] = []
    while len(drawn) < epochs * size:
        batch = sampler.next_batch()
        assert len(batch) == batch_size
        drawn += batch
        assert (sampler.position, sampler.epoch) == (len(drawn), len(drawn) // size)
    for epoch in range(epochs):
        visited = drawn[epoch * size : (epoch + 1) * size]
        assert sorted(visited) == list(range(size))
        assert shuffle or visited == list(range(size))


@given(size=sizes, batch_size=sizes, seed=seeds, before=st.integers(0, 6), after=st.integers(1, 6))
def test_a_resumed_sampler_goes_on_as_if_never_stopped(
    size: int, batch_size: int, seed: int, before: int, after: int
) -> None:
    whole = PromptSampler(size, batch_size, seed)
    expected = [whole.next_batch() for _ in range(before + after)]
    first = PromptSampler(size, batch_size, seed)
    for _ in range(before):
        first.next_batch()
    second = PromptSampler(size, batch_size, seed)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.next_batch() for _ in range(after)] == expected[before:]


@given(size=sizes, seed=seeds, batch_sizes=st.lists(sizes, min_size=2, max_size=5))
def test_the_order_does_not_depend_on_the_batch_size(
    size: int, seed: int, batch_sizes: list[int]
) -> None:
    reference = PromptSampler(size, 1, seed)
    state = reference.state_dict()
    for batch_size in batch_sizes:
        sampler = PromptSampler(size, batch_size, seed)
        sampler.load_state_dict(state)
        assert sampler.next_batch() == [reference.next_batch()[0] for _ in range(batch_size)]
        state = sampler.state_dict()


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    orders = []
    for seed in range(3):
        sampler = PromptSampler(50, 50, seed)
        orders += [tuple(sampler.next_batch()) for _ in range(3)]
    orders.append(tuple(range(50)))
    assert all(one != other for one, other in itertools.combinations(orders, 2))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (PromptSampler(9, 2, 5), "dataset_size is 8, this run's is 9; .*--prompt-data"),
        (PromptSampler(8, 2, 6), "seed is 5, this run's is 6; .*--seed"),
        (PromptSampler(8, 2, 5, shuffle=False), "shuffle is True, this run's is False"),
    ],
)
def test_a_position_in_another_order_is_refused(other: PromptSampler, message: str) -> None:
    saved = PromptSampler(8, 2, 5)
    saved.next_batch()
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved.state_dict())
    assert other.position == 0


def test_a_sampler_without_prompts_or_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="--prompt-data"):
        PromptSampler(0, 1, 0)
    with pytest.raises(ValueError, match="at least 1 prompt"):
        PromptSampler(1, 0, 0)
