"""What `danlu check` found, as one page that needs nothing else: tables, and examples with the learned tokens marked.

Everything that comes from data is escaped, and shown as in the terminal: line ends and control characters as signs.
"""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from danlu.core.examples import Example
from danlu.core.terminal import visible as safe
from danlu.pipeline.lint import CHECKS, ERROR
from danlu.tokens.show import headline, split_pieces, visible

if TYPE_CHECKING:
    from danlu.pipeline.check import Checked

CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #6b7280; --line: #e5e7eb; --paper: #ffffff; --card: #f9fafb;
  --one: #bbf7d0; --two: #bae6fd; --red: #b91c1c; --amber: #a16207; --green: #15803d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --soft: #9ca3af; --line: #374151; --paper: #111827;
  --card: #1f2937; --one: #14532d; --two: #0c4a6e; --red: #fca5a5; --amber: #fcd34d; --green: #86efac; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 system-ui, "Noto Sans CJK SC", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 32px 0 8px; }
h3 { font-size: 15px; margin: 20px 0 6px; }
.soft { color: var(--soft); } .scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: 6px 10px; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 600; } .number { text-align: right; white-space: nowrap; }
td.name, .error, .warning { white-space: nowrap; }
.error { color: var(--red); font-weight: 600; } .warning { color: var(--amber); font-weight: 600; }
.ok, .none td { color: var(--soft); }
.verdict { font-weight: 600; margin: 10px 0; white-space: normal; }
.verdict.good { color: var(--green); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 13px/1.7 ui-monospace, monospace; color: var(--soft); }
.one, .two { color: var(--ink); border-radius: 3px; padding: 1px 0; } .one { background: var(--one); }
.two { background: var(--two); } .label { font-style: italic; }
"""


def page(title: str, found: Sequence["Checked"], number: int) -> str:
    """The page about these steps, with so many examples of each."""
    parts = ["<!doctype html>", '<html lang="en"><head><meta charset="utf-8">',
             '<meta name="viewport" content="width=device-width, initial-scale=1">',
             f"<title>{_text(title)}: data check</title><style>{CSS}</style></head><body><main>",
             f"<h1>{_text(title)}: what is trained on</h1>",
             '<div class="soft">danlu check · every row of every step below · learned tokens are '
             '<span class="one">mar</span><span class="two">ked</span>, two colours in turn show where each ends</div>']
    for checked in found:
        parts += _step(checked, number)
    return "\n".join([*parts, "</main></body></html>", ""])


def _step(checked: "Checked", number: int) -> list[str]:
    from danlu.pipeline.check import shown_examples, verdict

    held_out = f", {checked.num_held_out:,} of them held out" if checked.num_held_out else ""
    parts = [f"<h2>{_text(checked.step)}: {checked.num_rows:,} rows{held_out}</h2>",
             f'<div class="verdict {"error" if checked.has_errors else "good"}">{_text(verdict(checked))}</div>']
    if checked.broken:
        parts.append(f'<div class="error">{_text(checked.broken)}</div>')
    parts.append('<div class="scroll"><table><tr><th>check</th><th></th><th class="number">rows</th>'
                 '<th class="number">share</th><th>first</th><th>what it means, and what was seen there</th></tr>')
    for check, severity, finding in checked.rows():
        word = severity if finding.rows else "ok"
        share = checked.share(finding) if finding.rows else ""
        seen = f"<br>{_text(finding.detail)}" if finding.detail else ""
        parts.append(f'<tr{"" if finding.rows else " class=none"}><td class="name">{check}</td>'
                     f'<td class="{word}">{word}</td><td class="number">{finding.rows:,}</td>'
                     f'<td class="number">{share}</td><td>{_text(finding.where)}</td>'
                     f'<td>{_text(CHECKS[check][1])}{seen}</td></tr>')
    parts.append("</table></div>")
    for example, why in shown_examples(checked, number):
        bad = why and CHECKS[why][0] == ERROR
        word = f'<span class="{"error" if bad else "warning"}">{why}</span> · ' if why else ""
        parts += [f"<h3>{word}{_text(headline(example))}</h3>", f"<pre>{_tokens(example, checked.tokenizer)}</pre>"]
    return parts


def _tokens(example: Example, tokenizer: Any) -> str:
    """The stem, then each branch; learned tokens marked."""
    several = len(example.branches) > 1 or len(example.stem)
    parts = []
    if len(example.stem):
        nothing = np.zeros(len(example.stem))
        text = "".join(_shown(piece.text) for piece in split_pieces(example.stem, nothing, tokenizer, None))
        parts.append(f'<span class="label">stem:</span> {text}')
    for number, branch in enumerate(example.branches):
        marked = []
        for place, piece in enumerate(split_pieces(branch.tokens, branch.weights, tokenizer, None)):
            text = _shown(piece.text)
            marked.append(f'<span class="{("one", "two")[place % 2]}">{text}</span>' if piece.weight else text)
        label = f'<span class="label">branch {number}:</span> ' if several else ""
        parts.append(label + "".join(marked))
    return "\n".join(parts)


def _shown(text: str) -> str:
    return escape(safe(visible(text)))


def _text(text: str) -> str:
    return escape(safe(text))
