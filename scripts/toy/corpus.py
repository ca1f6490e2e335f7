"""PURE: the toy language, drawn from a `random.Random`.

A prompt asks how to do a task of one of eight topics. A response is an opener and a list of clauses
("kindly knead the dough"); a clause has a tone word and mostly a task of the prompt's topic.

Invariants:
- the number of clauses is log-normal (P99 of the response length at least 5x its median), drawn
  before and independently of tone and topic, and the opener announces roughly how many follow, so
  that a small model can learn the tail;
- no response has more than MAX_CLAUSES clauses.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

# topic -> (verbs, nouns); a task is any verb with any noun of one topic
TOPICS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bread": (("bake", "knead", "slice", "butter"), ("dough", "loaf", "crust", "bun")),
    "garden": (("plant", "water", "weed", "prune"), ("seeds", "roses", "hedge", "lawn")),
    "bicycle": (("ride", "oil", "mend", "pump"), ("chain", "tyre", "brake", "saddle")),
    "tea": (("boil", "pour", "steep", "stir"), ("kettle", "leaves", "cup", "pot")),
    "music": (("play", "tune", "practise", "hum"), ("guitar", "song", "scale", "rhythm")),
    "letter": (("write", "fold", "seal", "post"), ("page", "envelope", "stamp", "card")),
    "house": (("sweep", "dust", "paint", "tidy"), ("floor", "shelf", "wall", "window")),
    "boat": (("sail", "row", "moor", "steer"), ("mast", "rudder", "anchor", "deck")),
}
TONES: dict[str, tuple[str, ...]] = {
    "polite": ("please", "kindly", "gladly", "gently"),
    "plain": ("then", "simply", "now", "also"),
    "rude": ("ugh", "duh", "bah", "whatever"),
}
QUESTIONS = (
    "How do I {task}?",
    "How can one {task}?",
    "Tell me how to {task}.",
    "Explain how to {task}.",
    "Show me how to {task}.",
    "I want to {task}.",
)
# (fewest clauses, opener): the last one whose count is reached opens the response
OPENERS = ((1, "Briefly:"), (3, "Well:"), (7, "In detail:"), (15, "Step by step:"))

MEDIAN_CLAUSES = 2.2
SIGMA_CLAUSES = 1.0
"""P99 of a log-normal is exp(2.33 * sigma) medians: with openers and cap, 8 in tokens."""
MAX_CLAUSES = 31
"""160 tokens with opener and end: above it (0.4% of the draws) a count is drawn again."""

TONE_KEPT = 0.8
"""Probability that a clause has its response's tone; else it has any of the three."""
ON_TOPIC = 0.85
"""Probability that a clause is about the prompt's topic."""

TOPIC_OF = {word: topic for topic, parts in TOPICS.items() for part in parts for word in part}


@dataclass(frozen=True)
class Example:
    """A question and one answer to it."""

    question: str
    response: str
    """With the space before its first word, without the end-of-sequence token."""
    finished: bool = True
    """False: cut in the middle, as by a token limit, so no end-of-sequence token follows."""


def render_prompt(question: str) -> str:
    """The form of every prompt in the corpus, without the beginning-of-sequence token."""
    return f"User: {question}\nAssistant:"


def words() -> list[str]:
    """Every word and mark of the language as it stands in text, in a fixed order."""
    inner = [word for topic in TOPICS.values() for part in topic for word in part]
    inner += [word for tones in TONES.values() for word in tones]
    fixed = " ".join((*QUESTIONS, *(opener for _, opener in OPENERS))).replace("{task}", "the")
    inner += [token.strip("?.:") for token in fixed.split()]
    return ["User", "Assistant"] + [f" {word}" for word in dict.fromkeys(inner)]


def questions() -> Iterator[str]:
    """Every question of the language."""
    for verbs, nouns in TOPICS.values():
        for verb in verbs:
            for noun in nouns:
                for form in QUESTIONS:
                    yield form.format(task=f"{verb} the {noun}")


def topic_of(text: str) -> str:
    """The topic of a question's or clause's task. Raises ValueError when it has none."""
    for word in text.replace(".", "").replace("?", "").split():
        if word in TOPIC_OF:
            return TOPIC_OF[word]
    raise ValueError(f"no word of any topic in {text!r}")


def draw_clause_count(rng: random.Random) -> int:
    """A log-normal number of clauses, from 1 to MAX_CLAUSES."""
    while True:
        count = max(1, round(rng.lognormvariate(math.log(MEDIAN_CLAUSES), SIGMA_CLAUSES)))
        if count <= MAX_CLAUSES:
            return count


def draw_response(rng: random.Random, topic: str, clause_count: int) -> str:
    """A response of a random tone about `topic`."""
    mood = rng.choice(list(TONES))
    clauses = []
    for _ in range(clause_count):
        tone = mood if rng.random() < TONE_KEPT else rng.choice(list(TONES))
        subject = topic if rng.random() < ON_TOPIC else rng.choice(list(TOPICS))
        verbs, nouns = TOPICS[subject]
        clauses.append(f"{rng.choice(TONES[tone])} {rng.choice(verbs)} the {rng.choice(nouns)}")
    opener = [text for fewest, text in OPENERS if clause_count >= fewest][-1]
    return f" {opener} {', '.join(clauses)}."


def draw_example(rng: random.Random, all_questions: list[str]) -> Example:
    """A question and a finished response of a log-normal number of clauses."""
    question = rng.choice(all_questions)
    return Example(question, draw_response(rng, topic_of(question), draw_clause_count(rng)))
