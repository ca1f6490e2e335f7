"""docs/troubleshooting.md quotes what the code really says.

The first cell of a row is a message, as code and with `…` for values, or in italics what somebody
else says, or what is seen without words.
"""

from __future__ import annotations

import re

import pytest

from tests.docs.documents import ROOT
from tests.docs.messages import is_said

PAGE = ROOT / "docs" / "troubleshooting.md"
HEADER = ("what you see", "---")
CELLS = [
    cell
    for cell in re.findall(r"^\| (.*?) \| ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    if cell not in HEADER
]
MESSAGES = [cell.strip("`") for cell in CELLS if re.fullmatch(r"`[^`]+`", cell)]


def test_every_row_is_a_message_or_in_italics() -> None:
    assert len(MESSAGES) > 50
    assert not [cell for cell in CELLS if not re.match(r"`[^`]+`$|\*[^*]+\*", cell)]


@pytest.mark.parametrize("message", MESSAGES)
def test_the_code_says_it(message: str) -> None:
    assert is_said(message)


def test_what_the_code_does_not_say_is_found_out() -> None:
    assert is_said("--load … holds no checkpoint")
    assert not is_said("--load … holds two checkpoints")
    assert not is_said("holds no checkpoint … --load")  # in another order
    assert not is_said("Megatron's `extra_args_provider`")  # a docstring
