"""PURE: the hidden rule of the toy language, and pairs of answers that it tells apart.

Invariants:
- the score is a mean over clauses, so it does not pay to answer longer or shorter;
- the first answer of a pair scores at least MARGIN more than the second.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from .corpus import TONES, TOPIC_OF, Example, draw_clause_count, draw_response, topic_of

TONE_SCORE = {"polite": 1.0, "plain": 0.0, "rude": -1.0}
TOPIC_SCORE = 0.5
UNFINISHED_PENALTY = 0.5
MALFORMED_SCORE = -1.5
"""The worst that a clause can score: nonsense must never pay."""

MARGIN = 0.25
"""Pairs that score closer than this are drawn again: an annotator would not tell them apart."""
SPOILED = 0.3
"""Share of answers that are cut, scrambled or repetitive: what a policy may stray into."""

_TONE_OF = {word: tone for tone, words in TONES.items() for word in words}


def preference(example: Example) -> float:
    """Mean over clauses of tone (-1, 0, 1) plus topic (-0.5, 0.5), less 0.5 when unfinished.

    A clause that is not of the form "tone verb the noun" scores -1.5. The result lies in [-2, 1.5].
    """
    topic = topic_of(example.question)
    _, _, body = example.response.partition(":")
    scores = [_clause_score(clause, topic) for clause in body.rstrip(".").split(",")]
    return sum(scores) / len(scores) - (0.0 if example.finished else UNFINISHED_PENALTY)


def draw_pair(rng: random.Random, all_questions: list[str]) -> tuple[Example, Example]:
    """(chosen, rejected): two answers to one question, lengths drawn independently."""
    question = rng.choice(all_questions)
    while True:
        pair = sorted((_draw_answer(rng, question) for _ in range(2)), key=preference)
        if preference(pair[1]) - preference(pair[0]) >= MARGIN:
            return pair[1], pair[0]


def _draw_answer(rng: random.Random, question: str) -> Example:
    answer = Example(question, draw_response(rng, topic_of(question), draw_clause_count(rng)))
    if rng.random() < SPOILED:
        answer = rng.choice(_SPOILERS)(rng, answer)
    return answer


def _cut(rng: random.Random, answer: Example) -> Example:
    """Stopped before its end, as by a token limit."""
    spaced = answer.response.split(" ")
    kept = " ".join(spaced[: rng.randint(3, len(spaced) - 1)])
    return replace(answer, response=kept, finished=False)


def _scramble(rng: random.Random, answer: Example) -> Example:
    """Its words in any order."""
    opener, _, body = answer.response.partition(": ")
    body_words = body.split(" ")
    rng.shuffle(body_words)
    return replace(answer, response=f"{opener}: {' '.join(body_words)}")


def _repeat(rng: random.Random, answer: Example) -> Example:
    """One of its words in every place of its last clauses."""
    opener, _, body = answer.response.partition(": ")
    body_words = body.split(" ")
    start = rng.randrange(len(body_words))
    word = rng.choice(body_words).strip(",.")
    body_words[start:] = [word] * (len(body_words) - start)
    return replace(answer, response=f"{opener}: {' '.join(body_words)}.")


_SPOILERS: tuple[Callable[[random.Random, Example], Example], ...] = (_cut, _scramble, _repeat)


def _clause_score(clause: str, topic: str) -> float:
    match clause.split():
        case [tone, verb, "the", noun] if (
            tone in _TONE_OF and verb in TOPIC_OF and TOPIC_OF[verb] == TOPIC_OF.get(noun)
        ):
            on_topic = TOPIC_OF[verb] == topic
            return TONE_SCORE[_TONE_OF[tone]] + (TOPIC_SCORE if on_topic else -TOPIC_SCORE)
    return MALFORMED_SCORE
