"""The toy tokenizer: one token a word of the language, bytes for everything else.

Byte-level pre-tokenization makes decoding exact for any text. There are no merges: a pre-token that
is a word of the vocabulary is one token (`ignore_merges`), any other falls apart into its bytes.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .corpus import Example, render_prompt, words

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
VOCABULARY_MULTIPLE = 16
"""The vocabulary divides by any small tensor-parallel size, so its rows need no padding."""

# Renders a question exactly as corpus.render_prompt does, and an answer as the corpus ends it.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- 'User: ' + message['content'] + '\\n' }}
    {%- elif message['role'] == 'assistant' %}
        {{- 'Assistant: ' + message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('a role is user or assistant, not ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A fast tokenizer that writes `<bos>` before a text and nothing after it."""
    byte_letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [BOS, EOS, PAD, *byte_letters, *(word.replace(" ", "Ġ") for word in words())]
    pieces += [f"<unused{n}>" for n in range(-len(pieces) % VOCABULARY_MULTIPLE)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in (BOS, EOS, PAD)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def encode_example(tokenizer: PreTrainedTokenizerFast, example: Example) -> tuple[list[int], int]:
    """Tokens of prompt and response, with `<eos>` when it is finished; the prompt's length."""
    prompt = tokenizer.encode(render_prompt(example.question))
    response = tokenizer.encode(example.response, add_special_tokens=False)
    end = [tokenizer.eos_token_id] if example.finished else []
    return prompt + response + end, len(prompt)
