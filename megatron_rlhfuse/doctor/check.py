"""One line of the report."""

from __future__ import annotations

from typing import NamedTuple

from megatron_rlhfuse.schedule.errors import escape

INSTALL = "run scripts/install.sh"

LONGEST_ERROR = 300
"""Characters of an error that are shown: enough for its message, and still one line."""


class Check(NamedTuple):
    """`verdict` is "ok", "note" (worth knowing) or "BAD" (must change); `remedy` is empty for ok.

    `seconds` is what a self-test took, with the start of its process; None for other checks.
    """

    subject: str
    found: str
    verdict: str
    remedy: str = ""
    seconds: float | None = None

    def to_json(self) -> dict[str, str | float]:
        """The form that `--json` prints."""
        fields: dict[str, str | float] = {
            "subject": self.subject,
            "found": self.found,
            "verdict": self.verdict,
            "remedy": self.remedy,
        }
        if self.seconds is not None:
            fields["seconds"] = round(self.seconds, 1)
        return fields

    def to_line(self, width: int) -> str:
        """The form on a terminal, the subject in `width` columns."""
        line = f"{self.verdict:4}  {self.subject:{width}}  {self.found}"
        if self.seconds is not None:
            line += f" ({self.seconds:.1f} s)"
        return f"{line}: {self.remedy}" if self.remedy else line


def last_line(text: str) -> str:
    """The last line of an error or a log that says something; one short printable line."""
    lines = [line.strip() for line in text.splitlines()]
    return escape(next((line for line in reversed(lines) if line), ""))[:LONGEST_ERROR]
