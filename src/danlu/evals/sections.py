"""Sections of the report that are a heading, a sentence and a table: losses in every unit, what rose, and questions.

The same rows of text go into the page, the Markdown and the terminal.

    for section in sections(report):
        print(section.title, section.header, section.rows)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from danlu.evals.figures import ChoiceRow, LossRow, Report, RiseRow
from danlu.evals.markdown import interval, number

MAX_SOURCES = 40  # that are shown; report.json has all of them


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and the sentence below it; `headline` is what a terminal says instead of both.

    num_names  columns of words, from the left; the others are figures
    """

    title: str
    lead: str
    headline: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_names: int


def sections(report: Report) -> list[Section]:
    """The sections that have something to say, in the order in which they are read."""
    made = [*_rises(report), *_losses(report), *_choices(report)]
    return [section for section in made if section.rows]


def _losses(report: Report) -> Iterator[Section]:
    windows: dict[tuple[int, int], list[str]] = {}
    for model in report.models:
        if model.stride is not None:
            windows.setdefault((model.context, model.context - model.stride), []).append(model.name)
    seen = " ".join(f"{', '.join(names)}: {context:,} tokens at a time, at least {before:,} of them before each token of a "
                    "longer text." for (context, before), names in windows.items())
    lead = (f"Every token is scored once and every byte with it. {seen} Loss (nats) and perplexity are "
            "per token and compare models of one tokenizer only; bits per byte and per character compare all. In brackets "
            "95 % intervals, over documents or over blocks of few documents; those of the loss and of the bits per "
            f"character are in report.json.{_without_context(report.losses)}")
    header = ("text", "", "model", "loss", "bits/token", "perplexity", "bits/byte", "bits/char", "tokens/char", "tokens",
              "bytes", "documents")
    kept = {name for name, _ in _largest_sources(report.losses)}
    rows = [row for row in report.losses if row.kind != "source" or row.group in kept]
    order = {key: place for place, key in enumerate(dict.fromkeys((row.kind, row.group) for row in report.losses))}
    rows.sort(key=lambda row: order[row.kind, row.group])  # the models of one group below each other
    yield Section("Loss and perplexity", lead, "loss, perplexity and bits (lower is better)", header,
                  [_loss_cells(row) for row in rows], 3)


def _largest_sources(rows: Sequence[LossRow]) -> list[tuple[str, int]]:
    sizes = {row.group: row.num_bytes for row in rows if row.kind == "source"}
    return sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:MAX_SOURCES]


def _without_context(rows: Sequence[LossRow]) -> str:
    counts = {row.model: row.num_without_context for row in rows if row.kind == "all" and row.num_without_context}
    return "".join(f" {name} has no token to begin with: {count:,} first tokens cost as much as a guess."
                   for name, count in counts.items())


def _loss_cells(row: LossRow) -> list[str]:
    return [row.group, "" if row.kind == "all" else row.kind, row.model, f"{row.loss:.4f}", f"{row.bits_per_token:.3f}",
            f"{row.perplexity:,.2f}", interval(row.bits_per_byte, row.low, row.high, 3), f"{row.bits_per_char:.3f}",
            f"{row.num_tokens / row.num_chars:.3f}", f"{row.num_tokens:,}", f"{row.num_bytes:,}", f"{row.num_documents:,}"]


def _rises(report: Report) -> Iterator[Section]:
    limited = any(row.max_rise is not None for row in report.rises)
    lead = ("Bits per byte against those of the reference on the same bytes: a positive change is something forgotten, a "
            "negative one something learned. In brackets 95 % intervals; both models are resampled together.")
    lead += " The gate goes by the change itself, not by its interval." if limited else ""
    header = ("text", "", "model", f"{report.reference} bits/byte", "bits/byte", "change",
              *(("allowed", "gate") if limited else ()))
    yield Section(f"Learned and forgotten since {report.reference}", lead,
                  f"change of bits per byte since {report.reference} (on the same bytes)", header,
                  [_rise_cells(row, limited) for row in report.rises], 3)


def _rise_cells(row: RiseRow, limited: bool) -> list[str]:
    change = _signed(row.value) if row.low is None or row.high is None else \
        f"{_signed(row.value)} [{_signed(row.low)} – {_signed(row.high)}]"
    cells = [row.group, "" if row.kind == "all" else row.kind, row.model, f"{row.reference_bits_per_byte:.3f}",
             f"{row.bits_per_byte:.3f}", change]
    if not limited:
        return cells
    if row.max_rise is None:
        return [*cells, "–", "–"]
    return [*cells, _signed(row.max_rise), "✗ forgotten" if row.too_high else "✓"]


def _signed(share: float) -> str:
    return f"{'+' if round(1000 * share) > 0 else ''}{number(100 * share, 1)} %"


def _choices(report: Report) -> Iterator[Section]:
    lead = ("Which answer has the highest log-probability: acc by the sum over its tokens, acc_norm by the sum over its "
            "bytes. A cloze is right where greedy decoding gives it; its perplexity is per continuation. In brackets 95 % "
            "Wilson intervals.")
    gains = any(row.gain is not None for row in report.choices)
    lead += f" The gain is acc less that of {report.reference} on the same questions." if gains else ""
    header = ("questions", "shots", "model", "acc", "acc_norm", "guessing", "perplexity",
              *((f"gain over {report.reference}",) if gains else ()), "number")
    yield Section("Questions by likelihood", lead, "questions by likelihood (higher is better)", header,
                  [_choice_cells(row, gains) for row in report.choices], 3)


def _choice_cells(row: ChoiceRow, gains: bool) -> list[str]:
    gain = "–" if row.gain is None else _signed(row.gain) if row.gain_low is None or row.gain_high is None else \
        f"{_signed(row.gain)} [{_signed(row.gain_low)} – {_signed(row.gain_high)}]"
    return [row.benchmark, str(row.num_shots), row.model, _share(row.acc, row.low, row.high),
            _share(row.acc_norm, row.norm_low, row.norm_high), "–" if row.chance is None else f"{100 * row.chance:.1f} %",
            "–" if row.perplexity is None else f"{row.perplexity:,.1f}", *([gain] if gains else []), f"{row.num_items:,}"]


def _share(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "–"
    around = "" if low is None or high is None else f" [{100 * low:.1f} – {100 * high:.1f}]"
    return f"{100 * value:.1f} %{around}"
