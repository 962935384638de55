"""The stage `eval`: measures models on held-out text, on questions and on tasks, and writes a report for people.

    report:
      stage: eval
      models: [base, chat]
      corpus: corpus
      benchmarks: {arc: {path: data/arc_easy.jsonl}}
      tasks: [task:skills]
      prompts: ["Who are you?"]
      beginnings: ["The capital of France is"]
      judge: judge
      preferences: [task:skills]
      reference: base
      max_rise: {en: 0.03}

Bits per byte are counted on the corpus's held-out documents and on `texts`, and stand beside gzip, xz and an n-gram model
of the corpus's training text. A judge scores the pairs of `preferences` and what the models answer to the tasks' prompts at
temperature 1. The `reference` is one of the models: how far drawn answers have moved from it is the KL divergence, what the
others have gained or forgotten is said in pairs on the same bytes and questions; `max_rise` limits what is forgotten.
The newest report of a step is also found at `runs/<recipe>/<step>/report.html`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator, model_validator

from danlu.core.artifact import Artifact, write_atomic
from danlu.core.config import free
from danlu.core.errors import ConfigError, DataError
from danlu.core.records import Message
from danlu.pipeline.benchmarks import ChoiceSettings, Quiz, benchmark_references, check_benchmarks
from danlu.pipeline.context import FILES, HUB, TASK, Context, Forecast, Input, Reference
from danlu.pipeline.sampling import continuations
from danlu.pipeline.texts import (
    READ_FOR_BITS,
    Forgotten,
    Reading,
    TextSettings,
    baselines,
    check_texts,
    gate,
    stride_of,
    text_references,
    window_of,
)

if TYPE_CHECKING:
    from rich.console import Console

    from danlu.evals.figures import Answered, Curve, ModelEntry, Report, SkillRow
    from danlu.evals.generative import Question
    from danlu.models.load import Loaded
    from danlu.pipeline.judging import Jury, Shown

KIND = "report"
SCHEMA = 7
READ_FOR_TASKS = ("samples",)
READ_FOR_PAIRS = ("num_pairs",)


class Settings(TextSettings, ChoiceSettings):
    """What is measured."""

    models: tuple[str, ...] = Field(min_length=1, description="steps, folders or hub ids of models, in reading order")
    tasks: tuple[str, ...] = Field((), description="tasks whose held-out prompts are answered, such as task:skills")
    num_prompts: int = Field(200, ge=1, description="prompts for each entry of tasks and judge_prompts")
    max_new_tokens: int = Field(64, ge=1, description="longest answer, in tokens")
    samples: int = Field(10, ge=0, description="answers to task prompts that are shown side by side")
    prompts: tuple[str, ...] = Field((), description="free prompts whose answers are shown side by side")
    beginnings: tuple[str, ...] = Field((), description="texts that are gone on with, without a template, and shown")
    judge: str | None = Field(None, description="a reward model: a step (stage rm), folder or hub id; scores answers")
    judge_prompts: tuple[str, ...] = Field((), description="files of prompts: the judge scores drawn answers to them, too")
    preferences: tuple[str, ...] = Field((), description="tasks (their held-out pairs) or files of preferences")
    num_pairs: int = Field(300, ge=1, description="pairs for each entry of preferences")
    reference: str | None = Field(None, description="one of models, with which the others are compared")
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
        asked, reads = bool(drawn or self.prompts), self.corpus is not None or bool(self.texts)
        quizzed = bool(self.benchmarks)
        for needed, there, names in (("corpus or texts", reads, (*READ_FOR_BITS, "max_rise")),
                                     ("corpus", self.corpus is not None, ("ngram_max_bytes",)),
                                     ("max_rise", bool(self.max_rise), ("on_rise",)),
                                     ("benchmarks", quizzed, ("num_shots", "num_items")),
                                     ("tasks", bool(self.tasks), READ_FOR_TASKS),
                                     ("tasks or judge_prompts", drawn, ("num_prompts",)),
                                     ("a judge", judged or not self.judge_prompts, ("judge_prompts",)),
                                     ("tasks, prompts or beginnings", asked or bool(self.beginnings),
                                      ("max_new_tokens",)),
                                     ("tasks or prompts", asked, ("batch_size",)),
                                     ("preferences", bool(self.preferences), READ_FOR_PAIRS),
                                     ("tasks, prompts or preferences", asked or bool(self.preferences), ("judge",)),
                                     ("corpus, texts, benchmarks, or a judge and tasks",
                                      reads or quizzed or (judged and drawn), ("reference",)),
                                     ("corpus, texts, benchmarks, preferences or judge",
                                      reads or quizzed or bool(self.preferences) or judged, ("micro_batch_tokens",))):
            unread = [name for name in names if name in self.model_fields_set and getattr(self, name) is not None]
            if unread and not there:
                raise ValueError(f"{unread[0]} is read with {needed} only")
        return self


def references(settings: Settings) -> list[Reference]:
    """The models, the texts, the questions, the tasks, the judge and the preferences; `reference` is one of the models."""
    found = [Reference(("models", place), text, ("model", FILES, HUB)) for place, text in enumerate(settings.models)]
    found += text_references(settings) + benchmark_references(settings)
    found += [Reference(("tasks", place), text, (TASK,)) for place, text in enumerate(settings.tasks)]
    if settings.judge is not None:
        found.append(Reference(("judge",), settings.judge, ("reward_model", FILES, HUB)))
    found += [Reference(("judge_prompts", place), text, (FILES,)) for place, text in enumerate(settings.judge_prompts)]
    pairs = enumerate(settings.preferences)
    return found + [Reference(("preferences", place), text, (FILES, TASK)) for place, text in pairs]


def check(settings: Settings, inputs: Mapping[str, Input]) -> None:
    """Raises ConfigError where there is nothing to measure, and for a reference that is none of the models."""
    if not (settings.corpus or settings.texts or settings.benchmarks or settings.tasks or settings.prompts
            or settings.beginnings or settings.judge_prompts or settings.preferences):
        raise ConfigError("there is nothing to measure the models on",
                          hint="Set corpus, texts, benchmarks, tasks, prompts, beginnings or preferences.")
    if settings.reference is not None and settings.reference not in settings.models:
        raise ConfigError(f"“{settings.reference}” is none of the models that are measured", key="reference",
                          hint="Write it as in `models`, or add it there.")
    check_texts(settings)
    check_benchmarks(settings)


def forecast(settings: Settings, inputs: Mapping[str, Input]) -> Forecast:
    """What will be measured; how long it takes depends on models that may not exist yet."""
    notes = []
    if settings.corpus is not None or settings.texts:
        notes.append(f"scores up to {settings.max_bytes:,} held-out bytes per category and model")
    if settings.benchmarks:
        shots = settings.num_shots > 0
        times = sum(1 + (shots and benchmark.shots is not None) for benchmark in settings.benchmarks.values())
        notes.append(f"up to {settings.num_items * times * len(settings.models):,} questions by likelihood")
    if settings.tasks or settings.prompts or settings.beginnings or settings.judge_prompts:
        answers = settings.num_prompts * len(settings.tasks) + len(settings.prompts) + len(settings.beginnings)
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

    reading: Reading
    quiz: Quiz
    jury: "Jury"
    notes: list[str]
    models: "list[ModelEntry]" = field(default_factory=list)
    skills: "list[SkillRow]" = field(default_factory=list)
    curves: "list[Curve]" = field(default_factory=list)
    shown: "dict[int, list[Shown]]" = field(default_factory=dict)  # by the place of the prompt
    free: "dict[int, list[Shown]]" = field(default_factory=dict)
    continued: "list[list[Answered]]" = field(default_factory=list)  # by model, then by the place of the beginning


def run(context: Context) -> dict[str, Any]:
    """Measures everything, writes the report and prints its headline. Returns the figures by name.

    Raises Forgotten where a model has forgotten more than `max_rise` allows and `on_rise` says to stop; the report is
    there nevertheless, where people look.
    """
    from danlu.evals.generative import spread
    from danlu.evals.report import terminal_table, write_report
    from danlu.pipeline.judging import Jury

    settings: Settings = context.settings
    notes: list[str] = []
    named = [*settings.models, *([settings.judge] if settings.judge is not None else [])]
    names = {text: _display_name(named, text) for text in named}
    found = _Findings(Reading(context, names, notes), Quiz(context, names, notes), Jury(context, names, notes), notes)
    questions = _questions(context, notes)
    found.shown = {place: [] for place in spread(questions, settings.samples)}
    for text in settings.models:
        _measure(context, text, names[text], questions, found)
    found.jury.ask_reference()
    found.jury.ask_judge()
    report = _report(context, names, questions, found)
    risen = gate(report.rises)
    write_report(report, context.work)
    context.console.print(terminal_table(report))
    if risen and settings.on_rise == "stop":
        _show(context.work, context.work.parent)
        raise Forgotten("more was forgotten than the recipe allows:\n  " + "\n  ".join(risen), where=context.step,
                        hint=f"The report: {context.work.parent / 'report.html'}. Mix in more of the old text, train more "
                             "gently, or raise max_rise; with on_rise: warn later steps run nevertheless.")
    return figures(report)


def _report(context: Context, names: Mapping[str, str], questions: "Sequence[Question]", found: _Findings) -> "Report":
    """All that was found, in the order in which it is read."""
    from danlu.evals.figures import FORGOTTEN, Report, Sample
    from danlu.evals.generative import shown
    from danlu.evals.lineage import loss_curves, trace

    settings: Settings = context.settings
    reading, quiz, jury = found.reading, found.quiz, found.jury
    bits = reading.bits + baselines(context, reading.texts, found.notes)
    rises, choices = reading.rises(), quiz.rows()
    found.notes += [FORGOTTEN + line for line in gate(rises)]
    folders = [source.folder for text in (*settings.models, settings.corpus, settings.judge)
               if text is not None and (source := context.inputs[text]).folder is not None]
    if settings.judge is not None and (folder := context.inputs[settings.judge].folder) is not None:
        found.curves += loss_curves(names[settings.judge], folder)
    lineage, ledger = trace(folders)
    return Report(
        title=f"{context.work.parent.parent.name} · {context.step}", fingerprint=context.fingerprint,
        models=found.models, bits=bits, losses=reading.losses, rises=rises, choices=choices, skills=found.skills,
        preferences=jury.preferences(), rewards=jury.rewards(),
        judge=names.get(settings.judge or "", ""), reference=names.get(settings.reference or "", ""),
        samples=[Sample(question.name, shown(question.messages), question.prompt.answer,
                        [item.answered for item in answers])
                 for place, answers in found.shown.items() if answers for question in (questions[place],)],
        free=[Sample("", settings.prompts[place], "", [item.answered for item in answers])
              for place, answers in sorted(found.free.items())],
        continued=[Sample("", text, "", answers) for text, answers in zip(settings.beginnings, zip(*found.continued))],
        lineage=lineage, ledger=ledger, curves=found.curves, notes=found.notes)


def figures(report: "Report") -> dict[str, float | int]:
    """The headline numbers by name: `bits_per_byte/zh/base`, `exact_match/copy/chat`, `kl/aligned`.

    Of pairs `margin/chat`, `pair_accuracy/judge` and `prefers_chosen/chat`, the last two with a category behind them for a
    part of the pairs; of answers at temperature 1 `judge_score/chat`, `kl/chat` and `sampled_exact_match/chat`; of
    questions `acc/arc/5-shot/chat` and `acc_norm/arc/5-shot/chat`, against the reference `rise/en/chat` (a share).
    """
    from danlu.evals.figures import ALL_PAIRS

    named: dict[str, float | int] = {f"bits_per_byte/{row.category}/{row.system}": row.value for row in report.bits}
    named |= {f"rise/{row.group}/{row.model}": row.value for row in report.rises if row.kind != "language"}
    for choice in report.choices:
        named[f"acc/{choice.benchmark}/{choice.num_shots}-shot/{choice.model}"] = choice.acc
        if choice.acc_norm is not None:
            named[f"acc_norm/{choice.benchmark}/{choice.num_shots}-shot/{choice.model}"] = choice.acc_norm
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
    place = artifact.folder.parent
    _show(artifact.folder, place)
    console.print(f"The report: {place / 'report.html'}", highlight=False, markup=False)


def _show(folder: Path, place: Path) -> None:
    """Copies the report's files; those of an older report that had more to show go."""
    from danlu.evals.report import FILES as REPORT_FILES

    for name in REPORT_FILES:
        source = folder / name
        if source.is_file():
            write_atomic(place / name, source.read_bytes())
        else:
            (place / name).unlink(missing_ok=True)


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


def _measure(context: Context, text: str, name: str, questions: "Sequence[Question]", found: _Findings) -> None:
    """Everything about one model; its memory is free again afterwards."""
    import torch

    from danlu.evals.figures import ModelEntry
    from danlu.evals.lineage import loss_curves
    from danlu.evals.perplexity import first_token_in_words
    from danlu.models.generate import max_positions
    from danlu.models.load import load_model

    settings: Settings = context.settings
    source = context.inputs[text]
    loaded = load_model(source.folder or text, device="cuda" if torch.cuda.is_available() else "cpu")
    positions, window = max_positions(loaded.lm), window_of(context)
    window = min(window, positions or window)
    reads = bool(found.reading.texts)
    said = first_token_in_words(loaded.tokenizer) if reads or settings.benchmarks else ""
    found.models.append(ModelEntry(name, source.fingerprint, loaded.lm.num_parameters(), len(loaded.tokenizer), window,
                                   [*loaded.notes, *([said] if said else [])],
                                   stride_of(settings, window) if reads else None))
    if source.folder is not None:
        found.curves += loss_curves(name, source.folder)
    found.reading.measure(name, loaded, window)
    found.quiz.ask(name, loaded, positions)
    if settings.beginnings:
        _go_on(settings, name, loaded, found)
    if questions or settings.prompts or settings.judge_prompts:
        _answers(context, name, loaded, questions, found)
    found.jury.prefer(name, loaded)


def _display_name(models: Sequence[str], text: str) -> str:
    """What a model is called in the report: the last part of its path, where that is not another's too."""
    short = Path(text).name or text
    return short if sum(Path(other).name == short for other in models) == 1 else text


def _go_on(settings: Settings, name: str, loaded: "Loaded", found: _Findings) -> None:
    """The beginnings, gone on with greedily and without a template."""
    from danlu.evals.figures import Answered

    try:
        made = continuations(loaded.lm, loaded.tokenizer, settings.beginnings, settings.max_new_tokens,
                             ("beginnings", "max_new_tokens"))
    except DataError as error:
        found.notes.append(f"{name} was given no beginnings: {error.message}")
        made = [""] * len(settings.beginnings)
    found.continued.append([Answered(name, text, None) for text in made])


def _answers(context: Context, name: str, loaded: "Loaded", questions: "Sequence[Question]", found: _Findings) -> None:
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
    found.jury.hear(name, loaded, answerer, questions, shown)
