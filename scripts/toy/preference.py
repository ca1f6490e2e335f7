"""PURE: the hidden rule of the toy language, and pairs of answers that it tells apart.

Invariants:
- the score is a mean over clauses, so it does not pay to answer longer or shorter;
- the first words of an answer score about what the whole scores: a critic that starts as the
  reward model then has no reason to prefer ending over going on;
- the first answer of a pair scores at least MARGIN more than the second.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from .corpus import (
    OPENERS,
    TONES,
    TOPIC_OF,
    Example,
    draw_clause_count,
    draw_response,
    topic_of,
)

TONE_SCORE = {"polite": 1.0, "plain": 0.0, "rude": -1.0}
MALFORMED_SCORE = -1.5
"""The worst that a clause can score: nonsense must never pay."""
UNOPENED_PENALTY = 1.0
UNFINISHED_PENALTY = 0.1

MARGIN = 0.5
"""Pairs that score closer than this are drawn again: an annotator would not tell them apart."""
SPOILED = 0.3
"""Probability that a pair is an answer and a copy with one fault: what a policy may stray into,
and pairs that differ in one respect teach the model what to look at."""
CUT = 0.1
"""Probability that an answer is stopped before its end."""

_TONE_OF = {word: tone for tone, words in TONES.items() for word in words}
_CLAUSE_WORDS = 4


def preference(example: Example) -> float:
    """Mean over clauses of their tone (-1, 0, 1), less the penalties; in [-2.6, 1].

    A clause that is not of the form "tone verb the noun" scores -1.5, but what is left of a clause
    where an unfinished answer stops counts for nothing.
    """
    opened = [text for _, text in OPENERS if example.response.startswith(f" {text}")]
    body = example.response.removeprefix(f" {opened[0]}") if opened else example.response
    clauses = body.rstrip(".").split(",")
    if not example.finished and len(clauses) > 1 and len(clauses[-1].split()) < _CLAUSE_WORDS:
        clauses.pop()
    score = sum(_clause_score(clause) for clause in clauses) / len(clauses)
    if not opened:
        score -= UNOPENED_PENALTY
    return score if example.finished else score - UNFINISHED_PENALTY


def draw_pair(rng: random.Random, all_questions: list[str]) -> tuple[Example, Example]:
    """(chosen, rejected): an answer, and its spoiled copy or another answer of any length."""
    question = rng.choice(all_questions)
    while True:
        first = _draw_answer(rng, question)
        if rng.random() < SPOILED:
            second = rng.choice(_SPOILERS)(rng, first)
        else:
            second = _draw_answer(rng, question)
        rejected, chosen = sorted((first, second), key=preference)
        if preference(chosen) - preference(rejected) >= MARGIN:
            return chosen, rejected


def _draw_answer(rng: random.Random, question: str) -> Example:
    """A response of the language, whole or stopped anywhere after its first clause."""
    response = draw_response(rng, topic_of(question), draw_clause_count(rng))
    if rng.random() >= CUT:
        return Example(question, response)
    opener, body = _opener_and_words(response)
    kept = body[: rng.randint(_CLAUSE_WORDS, len(body))]
    return Example(question, f"{opener}: {' '.join(kept)}".rstrip("."), finished=False)


def _scramble(rng: random.Random, answer: Example) -> Example:
    """Its words in any order."""
    opener, body = _opener_and_words(answer.response)
    rng.shuffle(body)
    return replace(answer, response=f"{opener}: {' '.join(body)}")


def _repeat(rng: random.Random, answer: Example) -> Example:
    """One of its words from some place to its end."""
    opener, body = _opener_and_words(answer.response)
    start = rng.randrange(len(body))
    body[start:] = [rng.choice(body).strip(",.")] * (len(body) - start)
    return replace(answer, response=f"{opener}: {' '.join(body)}.")


def _unopened(rng: random.Random, answer: Example) -> Example:
    """Without its opener."""
    return replace(answer, response=answer.response.partition(":")[2])


def _opener_and_words(response: str) -> tuple[str, list[str]]:
    opener, _, body = response.partition(": ")
    return opener, body.split(" ")


_SPOILERS: tuple[Callable[[random.Random, Example], Example], ...] = (
    _scramble,
    _repeat,
    _unopened,
)


def _clause_score(clause: str) -> float:
    match clause.split():
        case [tone, verb, "the", noun] if (
            tone in _TONE_OF and verb in TOPIC_OF and TOPIC_OF[verb] == TOPIC_OF.get(noun)
        ):
            return TONE_SCORE[_TONE_OF[tone]]
    return MALFORMED_SCORE
