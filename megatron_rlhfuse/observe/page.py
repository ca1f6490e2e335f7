"""The report's HTML: one file that holds its pictures and style and asks no network for anything.

PURE: from numbers and PNG bytes to a string.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from megatron_rlhfuse.observe.summary import Change, StageTime

KEY_SETTING_PREFIXES = ("rlhfuse_", "rollout_", "critic_", "ppo_")
KEY_SETTINGS = frozenset(
    {
        "actor_model",
        "reference_model",
        "reward_model",
        "reward_function",
        "prompt_data",
        "advantage_estimator",
        "train_iters",
        "global_batch_size",
        "micro_batch_size",
        "micro_batch_tokens",
        "rlhfuse_pack_sequences",
        "lr",
        "seed",
        "bf16",
        "world_size",
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "data_parallel_size",
    }
)
"""Settings shown at once; Megatron's hundreds of others are one click away."""


class Picture(NamedTuple):
    """A PNG; `wide` pictures take the width of the page, two others share it."""

    title: str
    png: bytes
    wide: bool


class Page(NamedTuple):
    """What the report shows; `settings` is None where the run left no args.json."""

    title: str
    iterations: tuple[int, int]
    averaged: int
    changes: Sequence[Change]
    stages: Sequence[StageTime]
    pictures: Sequence[Picture]
    notes: Sequence[str]
    settings: Mapping[str, Any] | None


def render(page: Page) -> str:
    """The whole HTML document."""
    first, last = page.iterations
    body = [
        "<header>",
        f"<h1>{escape(page.title)}</h1>",
        f"<p class='muted'>iterations {first} to {last}</p>",
        "</header>",
        _cards(page),
        *(f"<p class='note'>{escape(note)}</p>" for note in page.notes),
        "<section class='pictures'>",
        *(_picture(picture) for picture in page.pictures),
        "</section>",
        "<section class='tables'>",
        _changes_table(page),
        _stages_table(page.stages),
        "</section>",
        _settings(page.settings),
    ]
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{escape(page.title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def number(value: float) -> str:
    """`value` with four significant digits, without an exponent where it can be avoided."""
    if not math.isfinite(value):
        return "\u2013"
    if value and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.2e}".replace("-", "\u2212")
    digits = 3 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(digits, 0), 4)}f}".replace("-", "\u2212")


def _cards(page: Page) -> str:
    changes = {change.name: change for change in page.changes}
    cards = []
    for name, label in (("reward_mean", "Reward"), ("kl", "KL to the reference, nats/token")):
        if name in changes:
            change = changes[name]
            cards.append((label, f"{number(change.start)} \u2192 {number(change.end)}"))
    for stage in page.stages[-1:]:
        cards.append((f"Median {stage.label}", f"{number(stage.seconds)} s"))
    if "tokens_per_s" in changes:
        cards.append(("Throughput at the end", f"{number(changes['tokens_per_s'].end)} tokens/s"))
    items = "".join(
        f"<div class='card'><span>{escape(label)}</span><b>{escape(value)}</b></div>"
        for label, value in cards
    )
    return f"<section class='cards'>{items}</section>"


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode("ascii")
    kind = " class='wide'" if picture.wide else ""
    alt = escape(picture.title, quote=True)
    return f"<figure{kind}><img alt='{alt}' src='data:image/png;base64,{data}'></figure>"


def _changes_table(page: Page) -> str:
    over = "iteration" if page.averaged == 1 else f"{page.averaged} iterations"
    rows = [
        [escape(_with_unit(c.label, c.unit)), number(c.start), number(c.end)] for c in page.changes
    ]
    return _table("Start and end", ["metric", f"first {over}", f"last {over}"], rows)


def _stages_table(stages: Sequence[StageTime]) -> str:
    rows = [[escape(stage.label), number(stage.seconds), _percent(stage.share)] for stage in stages]
    return _table("Median times", ["stage", "seconds", "share"], rows)


def _settings(settings: Mapping[str, Any] | None) -> str:
    if settings is None:
        return ""
    key: list[list[str]] = []
    rest: list[list[str]] = []
    for name in sorted(settings):
        value = settings[name]
        if value is None:
            continue
        is_key = name in KEY_SETTINGS or name.startswith(KEY_SETTING_PREFIXES)
        row = [f"<code>{escape(name)}</code>", f"<code>{escape(str(value))}</code>"]
        (key if is_key else rest).append(row)
    header = ["setting", "value"]
    summary = f"<summary>{len(rest)} other settings</summary>"
    more = f"<details>{summary}{_table('', header, rest)}</details>" if rest else ""
    return f"<section class='settings'>{_table('Settings', header, key)}{more}</section>"


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    if not rows:
        return ""
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f"<div>{heading}<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _with_unit(label: str, unit: str) -> str:
    return f"{label} [{unit}]" if unit else label


def _percent(share: float) -> str:
    return f"{share:.0%}" if math.isfinite(share) else "\u2013"


_CSS = """
:root { color-scheme: light; --ink: #1f2933; --muted: #6b7785; --rule: #e4e7eb; }
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7f9; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0; }
h2 { font-size: 16px; margin: 0 0 8px; }
.muted { color: var(--muted); margin: 2px 0 0; }
.note { background: #fdf3e1; border-left: 3px solid #d9822b; padding: 8px 14px; margin: 0 0 16px; }
.cards { display: flex; flex-wrap: wrap; gap: 14px; margin: 22px 0; }
.card { flex: 1 1 200px; background: #fff; border: 1px solid var(--rule); border-radius: 8px;
  padding: 12px 16px; }
.card span { display: block; color: var(--muted); font-size: 13px; }
.card b { font-size: 21px; font-weight: 600; white-space: nowrap; }
.pictures { display: grid; grid-template-columns: repeat(2, 1fr); gap: 14px; }
figure { margin: 0; background: #fff; border: 1px solid var(--rule); border-radius: 8px;
  padding: 14px; }
figure.wide { grid-column: 1 / -1; }
img { display: block; width: 100%; }
.tables { display: grid; grid-template-columns: 3fr 2fr; gap: 14px; margin-top: 14px; }
.tables > div, .settings { background: #fff; border: 1px solid var(--rule); border-radius: 8px;
  padding: 16px 18px; align-self: start; }
.settings { margin-top: 14px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; color: var(--muted); font-weight: 500; font-size: 13px; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
tbody tr:last-child td { border-bottom: 0; }
.tables th:not(:first-child), .tables td:not(:first-child) { text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font-size: 13px; overflow-wrap: anywhere; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--muted); }
@media (max-width: 760px) { .pictures, .tables { grid-template-columns: 1fr; } }
"""
