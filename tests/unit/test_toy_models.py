"""The toy language, its hidden rule, its tokenizer and the cache of the folder made from them.

Training both models takes a minute and is left to `make toy`, which fails when they miss what they
are for.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_rlhfuse.data import PromptDataset

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import make_toy_models
from toy import corpus, preference
from toy.corpus import Example
from toy.packing import IGNORED, pack
from toy.sampling import sample_responses
from toy.tokenizer import encode_example, make_tokenizer

QUESTIONS = list(corpus.questions())
BREAD = "How do I knead the dough?"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def draw(seed: int, count: int) -> list[Example]:
    rng = random.Random(seed)
    return [corpus.draw_example(rng, QUESTIONS) for _ in range(count)]


def test_the_corpus_is_a_function_of_its_seed() -> None:
    assert draw(1, 50) == draw(1, 50)
    assert draw(1, 50) != draw(2, 50)


def test_response_lengths_are_as_skewed_as_real_ones(tokenizer: PreTrainedTokenizerFast) -> None:
    encoded = [encode_example(tokenizer, example) for example in draw(0, 4000)]
    lengths = sorted(len(tokens) - prompt for tokens, prompt in encoded)
    median, p99 = lengths[2000], lengths[3960]
    assert 10 <= median <= 20
    assert p99 >= 5 * median
    assert lengths[-1] <= 160


def test_length_says_nothing_about_the_score() -> None:
    examples = draw(0, 4000)
    short = [preference.preference(e) for e in examples if e.response.count(",") < 2]
    long = [preference.preference(e) for e in examples if e.response.count(",") >= 6]
    assert abs(sum(short) / len(short) - sum(long) / len(long)) < 0.1


def test_every_word_belongs_to_one_topic_or_tone() -> None:
    words = [word for topic in corpus.TOPICS.values() for part in topic for word in part]
    words += [word for tones in corpus.TONES.values() for word in tones]
    assert len(words) == len(set(words))
    assert len(QUESTIONS) == len(set(QUESTIONS)) == make_toy_models.MAX_PROMPTS


@pytest.mark.parametrize(
    ("response", "finished", "score"),
    [
        (" Briefly: kindly bake the bun, gladly knead the dough.", True, 1.0),
        (" Well: then bake the bun.", True, 0.0),
        (" Well: ugh bake the bun.", True, -1.0),
        (" In detail: kindly bake the bun, ugh bake the bun, kindly pour the pot.", True, 1 / 3),
        (" Well: kindly bake the pot.", True, -1.5),
        (" Well: kindly kindly kindly.", True, -1.5),
        (" kindly bake the bun.", True, 0.0),
        (" Well: kindly bake the bun, ugh bake", False, 0.9),
        (" Well: kindly bake the bun, ugh bake the", True, -0.25),
        (" Well: kindly bake the bun,", False, 0.9),
        (" Well: kindly bake the bun", False, 0.9),
        ("", True, -2.5),
    ],
)
def test_the_rule_scores_tone_and_form(response: str, finished: bool, score: float) -> None:
    assert preference.preference(Example(BREAD, response, finished)) == pytest.approx(score)


@given(st.integers(0, 2**32))
def test_a_pair_is_about_one_question_and_differs_enough(seed: int) -> None:
    chosen, rejected = preference.draw_pair(random.Random(seed), QUESTIONS)
    assert chosen.question == rejected.question
    gap = preference.preference(chosen) - preference.preference(rejected)
    assert gap >= preference.MARGIN


@given(st.text())
def test_decoding_gives_back_any_text(text: str) -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_word_is_a_token_and_a_prompt_begins_with_bos(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = corpus.render_prompt(BREAD)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode(text))
    assert pieces[:4] == ["<bos>", "User", ":", "ĠHow"]
    assert len(pieces) == 13
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert len(tokenizer) % 16 == 0


def test_the_chat_template_renders_the_form_of_the_corpus(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    example = draw(3, 1)[0]
    turns = [
        {"role": "user", "content": example.question},
        {"role": "assistant", "content": example.response.strip()},
    ]
    tokens, prompt = encode_example(tokenizer, example)
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert tokenizer.encode(asked, add_special_tokens=False) == tokens[:prompt]
    answered = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.encode(answered, add_special_tokens=False) == tokens


def test_a_saved_tokenizer_and_its_prompts_load(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.save_pretrained(tmp_path)
    make_toy_models.write_prompts(tmp_path / "prompts.jsonl", 40, seed=0)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    data = PromptDataset([tmp_path / "prompts.jsonl"], loaded, 64, "refuse")
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    assert len(data) == 40
    assert sum("messages" in json.loads(line) for line in lines) == 10
    for number in range(40):
        prompt = data[number]
        bare = prompt.text.removeprefix("<bos>")
        assert prompt.token_ids == tuple(tokenizer.encode(bare))
        assert bare.startswith("User: ") and bare.endswith("\nAssistant:")
        assert prompt.fields["topic"] in corpus.TOPICS


def tiny_llama(vocabulary: int, eos: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        eos_token_id=eos,
    )
    return LlamaForCausalLM(config).eval()


def test_a_packed_document_sees_itself_alone() -> None:
    model = tiny_llama(20, eos=1)
    documents = [([3, 4, 5, 6], 2), ([7, 8, 9], 1), ([10, 11, 12, 13, 14], 3)]
    rows = pack(documents, row_length=8, pad=0)
    assert rows.tokens.shape == (2, 8)
    logits = model(
        input_ids=rows.tokens, position_ids=rows.positions, attention_mask=rows.attention
    ).logits.flatten(0, 1)
    labels = rows.labels.flatten()
    for (tokens, prompt), end in zip(documents, rows.ends.tolist(), strict=True):
        begin = end - len(tokens) + 1
        alone = model(input_ids=torch.tensor([tokens])).logits[0]
        torch.testing.assert_close(logits[begin : end + 1], alone, rtol=1e-5, atol=1e-5)
        expected = [IGNORED] * (prompt - 1) + tokens[prompt:] + [IGNORED]
        assert labels[begin : end + 1].tolist() == expected
    assert (labels != IGNORED).sum() == 6
    with pytest.raises(ValueError, match="document of 9 tokens does not fit a row of 8"):
        pack([([1] * 9, 1)], row_length=8, pad=0)


def test_sampling_draws_from_the_model(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama(len(tokenizer), tokenizer.eos_token_id)
    model.lm_head.weight.data.mul_(1000)  # one token stands out: draws equal the greedy choice
    asked = [QUESTIONS[0], QUESTIONS[2], QUESTIONS[300]]  # of different lengths
    responses = sample_responses(model, tokenizer, asked, max_new_tokens=12, seed=0)
    for question, response in zip(asked, responses, strict=True):
        prompt = torch.tensor([tokenizer.encode(corpus.render_prompt(question))])
        greedy = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
        assert response == greedy.tolist()


def test_a_finished_response_ends_in_eos_and_others_go_on(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = tiny_llama(len(tokenizer), tokenizer.eos_token_id)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # uniform draws: eos comes once in 368
    responses = sample_responses(model, tokenizer, QUESTIONS[:200], max_new_tokens=20, seed=0)
    assert any(len(response) < 20 for response in responses)
    for response in responses:
        assert tokenizer.eos_token_id not in response[:-1]
        assert len(response) == 20 or response[-1] == tokenizer.eos_token_id


def fake_build(calls: list[int]) -> Any:
    def build_models(folder: Path, seed: int) -> dict[str, Any]:
        calls.append(seed)
        (folder / "actor").mkdir()
        return {"measured": True}

    return build_models


def test_a_second_call_does_nothing_and_new_settings_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []
    monkeypatch.setattr("toy.build.build_models", fake_build(calls))
    output = tmp_path / "toy"
    arguments = ["--output", str(output), "--prompts", "3"]
    assert make_toy_models.main(arguments) == 0
    assert make_toy_models.main(arguments) == 0
    assert calls == [0]
    assert "is up to date" in capsys.readouterr().out
    assert json.loads((output / "toy.json").read_text())["measured"] is True
    make_toy_models.main([*arguments, "--seed", "7"])
    monkeypatch.setattr(make_toy_models, "script_hash", lambda: "changed")
    make_toy_models.main([*arguments, "--seed", "7"])
    assert calls == [0, 7, 7]
    assert {entry.name for entry in tmp_path.iterdir()} == {"toy"}


def test_a_failed_call_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "toy"
    monkeypatch.setattr("toy.build.build_models", fake_build([]))
    make_toy_models.main(["--output", str(output)])
    before = (output / "toy.json").read_text()

    def fail(folder: Path, seed: int) -> dict[str, Any]:
        raise RuntimeError("the skew is too small")

    monkeypatch.setattr("toy.build.build_models", fail)
    with pytest.raises(RuntimeError, match="skew"):
        make_toy_models.main(["--output", str(output), "--seed", "1"])
    assert (output / "toy.json").read_text() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"toy"}


def test_what_others_wrote_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(SystemExit, match=r"holds thesis\.tex"):
        make_toy_models.main(["--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="is a file"):
        make_toy_models.main(["--output", str(tmp_path / "thesis.tex")])
    assert (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("count", ["0", "100000"])
def test_an_impossible_number_of_prompts_is_refused(
    count: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        make_toy_models.main(["--output", "unused", "--prompts", count])
    assert "--prompts" in capsys.readouterr().err
