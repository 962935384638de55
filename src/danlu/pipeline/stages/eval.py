"""The stage `eval`: measures models on held-out text and on tasks, and writes a report for people.

    report:
      stage: eval
      models: [base, chat]
      corpus: corpus
      tasks: [task:skills]
      prompts: ["Who are you?"]
      judge: judge
      preferences: [task:skills]
      reference: chat

Bits per byte are counted on the corpus's held-out documents and stand beside gzip, xz and an n-gram model of the same
training text. A judge scores the pairs of `preferences` and what the models answer to the tasks' prompts at temperature 1;
how far these answers have moved from the `reference` is the KL divergence. The newest report of a step is also found at
`runs/<recipe>/<step>/report.html`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from danlu.core.artifact import Artifact, write_atomic
from danlu.core.config import Config, free
from danlu.core.errors import ConfigError, DataError
from danlu.core.records import Document, Message
from danlu.pipeline.context import FILES, HUB, TASK, Context, Forecast, Input, Reference

if TYPE_CHECKING:
    from rich.console import Console

    from danlu.evals.figures import BitsRow, Curve, ModelEntry, Report, SkillRow
    from danlu.evals.generative import Question
    from danlu.models.load import Loaded
    from danlu.pipeline.judging import Jury, Shown

KIND = "report"
SCHEMA = 5
NGRAM = "n-gram"
READ_FOR_BITS = ("max_bytes", "cutoff_len", "ngram_max_bytes")
READ_FOR_TASKS = ("samples",)
READ_FOR_PAIRS = ("num_pairs",)
READ_FOR_ANSWERS = ("max_new_tokens", "batch_size")
LONGEST_WINDOW = 2048  # tokens, for models that do not say what they were trained on


class Settings(Config):
    """What is measured."""

    models: tuple[str, ...] = Field(min_length=1, description="steps, folders or hub ids of models, in reading order")
    corpus: str | None = Field(None, description="a corpus step, whose held-out documents are scored")
    max_bytes: int = Field(150_000, ge=1000, description="held-out bytes scored per category, in whole documents")
    cutoff_len: int | None = Field(None, ge=8, description="tokens seen at once when scored; by default as in training")
    ngram_max_bytes: int = Field(16_000_000, ge=0, description="training text for the n-gram baseline; 0: no n-gram")
    tasks: tuple[str, ...] = Field((), description="tasks whose held-out prompts are answered, such as task:skills")
    num_prompts: int = Field(200, ge=1, description="prompts for each entry of tasks and judge_prompts")
    max_new_tokens: int = Field(64, ge=1, description="longest answer, in tokens")
    samples: int = Field(10, ge=0, description="answers to task prompts that are shown side by side")
    prompts: tuple[str, ...] = Field((), description="free prompts whose answers are shown side by side")
    judge: str | None = Field(None, description="a reward model: a step (stage rm), folder or hub id; scores answers")
    judge_prompts: tuple[str, ...] = Field((), description="files of prompts: the judge scores drawn answers to them, too")
    preferences: tuple[str, ...] = Field((), description="tasks (their held-out pairs) or files of preferences")
    num_pairs: int = Field(300, ge=1, description="pairs for each entry of preferences")
    reference: str | None = Field(None, description="one of models: how far the others have moved from it (KL)")
    batch_size: int = free(64, ge=1, description="prompts answered at once")
    micro_batch_tokens: int = free(8192, ge=1, description="tokens scored at once")

    @field_validator("models", "tasks", "judge_prompts", "preferences")
    @classmethod
    def _once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError("something is named twice")
        return names

    @model_validator(mode="after")
    def _eval_reads_all(self) -> "Settings":
        drawn, judged = bool(self.tasks or self.judge_prompts), self.judge is not None
        asked = bool(drawn or self.prompts)
        for needed, there, names in (("corpus", self.corpus is not None, READ_FOR_BITS),
                                     ("tasks", bool(self.tasks), READ_FOR_TASKS),
                                     ("tasks or judge_prompts", drawn, ("num_prompts",)),
                                     ("a judge", judged or not self.judge_prompts, ("judge_prompts",)),
                                     ("tasks or prompts", asked, READ_FOR_ANSWERS),
                                     ("preferences", bool(self.preferences), READ_FOR_PAIRS),
                                     ("tasks, prompts or preferences", asked or bool(self.preferences), ("judge",)),
                                     ("a judge and tasks", judged and drawn, ("reference",)),
                                     ("corpus, preferences or judge", bool(self.corpus or self.preferences) or judged,
                                      ("micro_batch_tokens",))):
            unread = [name for name in names if name in self.model_fields_set and getattr(self, name) is not None]
            if unread and not there:
                raise ValueError(f"{unread[0]} is read with {needed} only")
        return self


def references(settings: Settings) -> list[Reference]:
    """The models, the corpus, the tasks, the judge and the preferences; `reference` is one of the models."""
    found = [Reference(("models", place), text, ("model", FILES, HUB)) for place, text in enumerate(settings.models)]
    if settings.corpus is not None:
        found.append(Reference(("corpus",), settings.corpus, ("corpus",)))
    found += [Reference(("tasks", place), text, (TASK,)) for place, text in enumerate(settings.tasks)]
    if settings.judge is not None:
        found.append(Reference(("judge",), settings.judge, ("reward_model", FILES, HUB)))
    found += [Reference(("judge_prompts", place), text, (FILES,)) for place, text in enumerate(settings.judge_prompts)]
    pairs = enumerate(settings.preferences)
    return found + [Reference(("preferences", place), text, (FILES, TASK)) for place, text in pairs]


def check(settings: Settings, inputs: Mapping[str, Input]) -> None:
    """Raises ConfigError where there is nothing to measure, and for a reference that is none of the models."""
    if not (settings.corpus or settings.tasks or settings.prompts or settings.judge_prompts or settings.preferences):
        raise ConfigError("there is nothing to measure the models on",
                          hint="Set corpus, tasks, prompts or preferences.")
    if settings.reference is not None and settings.reference not in settings.models:
        raise ConfigError(f"“{settings.reference}” is none of the models that are measured", key="reference",
                          hint="Write it as in `models`, or add it there.")


def forecast(settings: Settings, inputs: Mapping[str, Input]) -> Forecast:
    """What will be measured; how long it takes depends on models that may not exist yet."""
    notes = []
    if settings.corpus is not None:
        notes.append(f"scores up to {settings.max_bytes:,} held-out bytes per category and model")
    if settings.tasks or settings.prompts or settings.judge_prompts:
        answers = settings.num_prompts * len(settings.tasks) + len(settings.prompts)
        drawn = len(settings.tasks) + len(settings.judge_prompts) if settings.judge is not None else 0
        answers += settings.num_prompts * drawn
        notes.append(f"up to {answers * len(settings.models):,} answers of at most {settings.max_new_tokens} tokens")
    if settings.preferences:
        pairs = settings.num_pairs * len(settings.preferences)
        notes.append(f"up to {pairs:,} pairs, read by {len(settings.models) + (settings.judge is not None)} models")
    return Forecast(notes=notes)


@dataclass(slots=True)
class _Findings:
    """What is gathered model by model."""

    models: "list[ModelEntry]" = field(default_factory=list)
    bits: "list[BitsRow]" = field(default_factory=list)
    skills: "list[SkillRow]" = field(default_factory=list)
    curves: "list[Curve]" = field(default_factory=list)
    shown: "dict[int, list[Shown]]" = field(default_factory=dict)  # by the place of the prompt
    free: "dict[int, list[Shown]]" = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def run(context: Context) -> dict[str, Any]:
    """Measures everything, writes the report and prints its headline. Returns the figures by name."""
    from danlu.evals.figures import Report, Sample
    from danlu.evals.generative import shown, spread
    from danlu.evals.lineage import loss_curves, trace
    from danlu.evals.report import terminal_table, write_report
    from danlu.pipeline.judging import Jury

    settings: Settings = context.settings
    found = _Findings()
    named = [*settings.models, *([settings.judge] if settings.judge is not None else [])]
    names = {text: _display_name(named, text) for text in named}
    texts = _heldout(context, found.notes)
    questions = _questions(context, found.notes)
    found.shown = {place: [] for place in spread(questions, settings.samples)}
    jury = Jury(context, names, found.notes)
    for text in settings.models:
        _measure(context, text, names[text], texts, questions, found, jury)
    jury.ask_reference()
    jury.ask_judge()
    if texts:
        found.bits += _baselines(context, texts, found.notes)
    folders = [source.folder for text in (*settings.models, settings.corpus, settings.judge)
               if text is not None and (source := context.inputs[text]).folder is not None]
    if settings.judge is not None and (folder := context.inputs[settings.judge].folder) is not None:
        found.curves += loss_curves(names[settings.judge], folder)
    lineage, ledger = trace(folders)
    report = Report(
        title=f"{context.work.parent.parent.name} · {context.step}", fingerprint=context.fingerprint,
        models=found.models, bits=found.bits, skills=found.skills, preferences=jury.preferences(), rewards=jury.rewards(),
        judge=names.get(settings.judge or "", ""), reference=names.get(settings.reference or "", ""),
        samples=[Sample(question.name, shown(question.messages), question.prompt.answer,
                        [item.answered for item in answers])
                 for place, answers in found.shown.items() if answers for question in (questions[place],)],
        free=[Sample("", settings.prompts[place], "", [item.answered for item in answers])
              for place, answers in sorted(found.free.items())],
        lineage=lineage, ledger=ledger, curves=found.curves, notes=found.notes)
    write_report(report, context.work)
    context.console.print(terminal_table(report))
    return figures(report)


def figures(report: "Report") -> dict[str, float | int]:
    """The headline numbers by name: `bits_per_byte/zh/base`, `exact_match/copy/chat`, `kl/aligned`.

    Of pairs `margin/chat`, `pair_accuracy/judge` and `prefers_chosen/chat`, the last two with a category behind them for a
    part of the pairs; of answers at temperature 1 `judge_score/chat`, `kl/chat` and `sampled_exact_match/chat`.
    """
    from danlu.evals.figures import ALL_PAIRS

    named: dict[str, float | int] = {f"bits_per_byte/{row.category}/{row.system}": row.value for row in report.bits}
    named |= {f"exact_match/{row.task}/{row.model}": row.value for row in report.skills}
    for row in report.preferences:
        name = "pair_accuracy/judge" if row.kind == "judge" else f"prefers_chosen/{row.system}"
        named[name if row.category == ALL_PAIRS else f"{name}/{row.category}"] = row.value
        if row.category == ALL_PAIRS and row.kind == "model":
            named[f"margin/{row.system}"] = row.margin
    for reward in report.rewards:
        named[f"judge_score/{reward.model}"] = reward.score
        if reward.exact is not None:
            named[f"sampled_exact_match/{reward.model}"] = reward.exact
        if reward.kl is not None:
            named[f"kl/{reward.model}"] = reward.kl
    return named


def published(artifact: Artifact, console: "Console") -> None:
    """Puts the newest report beside the artifacts' folders, where people look: `runs/<recipe>/<step>/report.html`."""
    from danlu.evals.report import FILES as REPORT_FILES

    place = artifact.folder.parent
    for name in REPORT_FILES:
        source = artifact.folder / name
        if source.is_file():
            write_atomic(place / name, source.read_bytes())
        else:
            (place / name).unlink(missing_ok=True)  # of an older report that had more to show
    console.print(f"The report: {place / 'report.html'}", highlight=False, markup=False)


def _heldout(context: Context, notes: list[str]) -> dict[str, list[Document]]:
    """The held-out documents to be scored, by category."""
    from danlu.evals.perplexity import choose_documents
    from danlu.text.corpus import read_corpus

    settings: Settings = context.settings
    if settings.corpus is None:
        return {}
    groups: dict[str, list[Document]] = {}
    for document in read_corpus(context.inputs[settings.corpus].require_folder(), "heldout"):
        groups.setdefault(document.category, []).append(document)
    if not groups:
        raise DataError("holds no held-out documents", where=str(context.inputs[settings.corpus].folder),
                        hint="Let the corpus step hold some out, or leave `corpus` away here.")
    chosen = {}
    for category in sorted(groups):
        chosen[category], said = choose_documents(groups[category], settings.max_bytes)
        notes += said
    return chosen


def _questions(context: Context, notes: list[str]) -> "list[Question]":
    """The held-out prompts of all tasks, each only once."""
    from danlu.evals.generative import ask

    settings: Settings = context.settings
    found: dict[tuple[Message, ...], Question] = {}
    for name in settings.tasks:
        asked = ask(name, context.seed, settings.num_prompts)
        if len(asked) < settings.num_prompts:
            notes.append(f"{name} has {len(asked)} held-out prompts, not {settings.num_prompts}")
        for question in asked:
            found.setdefault(question.messages, question)
    return list(found.values())


def _measure(context: Context, text: str, name: str, texts: Mapping[str, Sequence[Document]],
             questions: "Sequence[Question]", found: _Findings, jury: "Jury") -> None:
    """Everything about one model; its memory is free again afterwards."""
    import torch

    from danlu.evals.figures import ModelEntry
    from danlu.evals.lineage import loss_curves
    from danlu.models.generate import max_positions
    from danlu.models.load import load_model

    settings: Settings = context.settings
    source = context.inputs[text]
    loaded = load_model(source.folder or text, device="cuda" if torch.cuda.is_available() else "cpu")
    window = _window(context)
    window = min(window, max_positions(loaded.lm) or window)
    found.models.append(ModelEntry(name, source.fingerprint, loaded.lm.num_parameters(), len(loaded.tokenizer), window,
                                   list(loaded.notes)))
    if source.folder is not None:
        found.curves += loss_curves(name, source.folder)
    if texts:
        found.bits += _model_bits(context, name, loaded, texts, window, found.notes)
    if questions or settings.prompts or settings.judge_prompts:
        _answers(context, name, loaded, questions, found, jury)
    jury.prefer(name, loaded)


def _window(context: Context) -> int:
    """How many tokens every model may see at once: what the one that was trained on the fewest knows, to be fair."""
    from danlu.evals.lineage import trained_context

    settings: Settings = context.settings
    folders = [context.inputs[text].folder for text in settings.models]
    trained = [trained_context(folder) for folder in folders if folder is not None]
    return settings.cutoff_len or min((length for length in trained if length is not None), default=LONGEST_WINDOW)


def _display_name(models: Sequence[str], text: str) -> str:
    """What a model is called in the report: the last part of its path, where that is not another's too."""
    short = Path(text).name or text
    return short if sum(Path(other).name == short for other in models) == 1 else text


def _model_bits(context: Context, name: str, loaded: "Loaded", texts: Mapping[str, Sequence[Document]], window: int,
                notes: list[str]) -> "list[BitsRow]":
    from danlu.evals.figures import BitsRow
    from danlu.evals.perplexity import bits_per_byte, score_documents

    rows = []
    for category, documents in texts.items():
        with context.progress(f"{name}: bits per byte, {category}", total=100) as bar:
            scores = score_documents(loaded.root, loaded.tokenizer, documents, context=window,
                                     micro_batch_tokens=context.settings.micro_batch_tokens, progress=_percent(bar))
        result = bits_per_byte(scores)
        if result.num_inexact:
            notes.append(f"{name}: the tokens of {result.num_inexact} of {result.num_documents} {category} documents "
                         "do not give back their text, so these bits are for a slightly different text")
        rows.append(BitsRow(category, name, "model", result.value, result.low, result.high, result.num_bytes,
                            result.num_documents))
    return rows


def _percent(bar: Any) -> Callable[[float], None]:
    return lambda share: bar.update(100 * share)


def _baselines(context: Context, texts: Mapping[str, Sequence[Document]], notes: list[str]) -> "list[BitsRow]":
    """gzip and xz of each category's text as a whole, and the n-gram model document by document."""
    from danlu.evals.baselines import ByteNgram, gzip_bits, xz_bits
    from danlu.evals.figures import BitsRow
    from danlu.evals.perplexity import DocumentScore, bits_per_byte

    rows = []
    training = _training_text(context, notes)
    model = ByteNgram.train(training) if training else None
    for category, documents in texts.items():
        parts = [document.text.encode() for document in documents]
        if model is not None:
            result = bits_per_byte([DocumentScore(document.id, len(part), len(part), model.bits(part))
                                    for document, part in zip(documents, parts, strict=True)])
            rows.append(BitsRow(category, NGRAM, "baseline", result.value, result.low, result.high, result.num_bytes,
                                len(parts)))
        whole, num_bytes = b"\n".join(parts), sum(map(len, parts))
        for system, bits in (("xz -9", xz_bits(whole)), ("gzip -9", gzip_bits(whole))):
            # by the bytes that all systems are measured on, the line ends between documents are not among them
            rows.append(BitsRow(category, system, "baseline", bits / num_bytes, None, None, num_bytes, len(parts)))
    return rows


def _training_text(context: Context, notes: list[str]) -> list[bytes]:
    """The corpus's training documents for the n-gram model, as many as it may have.

    The corpus is read twice, so that memory holds what is chosen and not the whole of it.
    """
    from danlu.evals.perplexity import beginning, choose_places
    from danlu.text.corpus import read_corpus

    settings: Settings = context.settings
    assert settings.corpus is not None, "held-out text came from a corpus"
    if settings.ngram_max_bytes == 0:
        return []
    folder = context.inputs[settings.corpus].require_folder()
    total = 0

    def sizes() -> Iterator[tuple[str, int]]:
        nonlocal total
        for document in read_corpus(folder, "train"):
            size = len(document.text.encode())
            total += size
            yield document.id, size

    chosen = choose_places(sizes(), settings.ngram_max_bytes)
    wanted = dict(chosen)
    found = {place: beginning(document.text, wanted[place]).encode()
             for place, document in enumerate(read_corpus(folder, "train")) if place in wanted}
    parts = [found[place] for place, _ in chosen]
    if sum(map(len, parts)) < total:
        notes.append(f"the n-gram model learned from {sum(map(len, parts)):,} of the {total:,} bytes of training text")
    return [part for part in parts if part]


def _answers(context: Context, name: str, loaded: "Loaded", questions: "Sequence[Question]", found: _Findings,
             jury: "Jury") -> None:
    """Tasks and free prompts under the chat template, greedily and for the judge also drawn."""
    from danlu.evals.figures import Answered
    from danlu.evals.generative import Answerer, skill_rows
    from danlu.pipeline.judging import Shown

    settings: Settings = context.settings
    try:
        answerer = Answerer(loaded.lm, loaded.tokenizer, max_new_tokens=settings.max_new_tokens,
                            batch_size=settings.batch_size)
    except ConfigError as error:
        found.notes.append(f"{name} was asked nothing: {error.message}")
        return
    dialogues = [question.messages for question in questions] + [(Message("user", text),) for text in settings.prompts]
    with context.progress(f"{name}: answers", total=len(dialogues)) as bar:
        answers = answerer.say(dialogues, lambda done: bar.update(done))
    texts = ["" if said is None else said.text for said in answers]
    scored = [question.scored(text) for question, text in zip(questions, texts, strict=False)]
    found.skills += skill_rows(name, scored)
    shown = []
    for place, row in found.shown.items():
        row.append(Shown(Answered(name, texts[place], scored[place].score == 1.0), answers[place]))
        shown.append(row[-1])
    for place, said in enumerate(answers[len(questions):]):
        row = found.free.setdefault(place, [])
        row.append(Shown(Answered(name, "" if said is None else said.text, None), said))
        shown.append(row[-1])
    num_wrong = sum(place < len(questions) for place in answerer.unasked)
    for number, what, so in ((num_wrong, "prompts of tasks", "count as wrong"),
                             (len(answerer.unasked) - num_wrong, "free prompts", "were not asked")):
        if number:
            found.notes.append(f"{name}: {number} {what} left no room for an answer of {settings.max_new_tokens} tokens "
                               f"(or were refused by the chat template) and {so}")
    jury.hear(name, loaded, answerer, questions, shown)
