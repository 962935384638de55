"""What the stage `eval` measures of questions with a choice of answers, and of clozes: files of items, by likelihood.

    benchmarks:
      arc: {path: data/arc_easy.jsonl}
      mmlu: {path: data/mmlu/test, shots: data/mmlu/dev}
    num_shots: 5

Every benchmark is asked without examples, and where it has `shots` also with the first `num_shots` of the same subject
from there. An item that is one of the examples is never asked. All models are asked the same items.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from danlu.core.config import Config
from danlu.core.errors import ConfigError, DataError
from danlu.core.ledger import Ledger
from danlu.evals.choices import Answers, Item, read_items
from danlu.pipeline.context import FILES, Context, Reference

if TYPE_CHECKING:
    from danlu.evals.figures import ChoiceRow
    from danlu.evals.likelihood import ItemScore
    from danlu.models.load import Loaded


class Benchmark(Config):
    """One set of questions."""

    path: str = Field(min_length=1, description="file, folder or glob of questions: jsonl, json, csv, tsv, parquet")
    shots: str | None = Field(None, description="where examples come from: the training or dev split")
    answers: Answers | None = Field(None, description="compare the answers' letters or their texts; default: as the set is")
    description: str = Field("", description="what stands before everything; {subject} is the file's name in words")


class ChoiceSettings(Config):
    """The keys about questions with a choice of answers."""

    benchmarks: dict[str, Benchmark] = Field({}, description="name → file of questions, compared by likelihood")
    num_shots: int = Field(5, ge=0, le=100, description="examples before a question, beside none; where there are shots")
    num_items: int = Field(500, ge=1, description="questions of each benchmark, spread evenly over it")


def benchmark_references(settings: ChoiceSettings) -> list[Reference]:
    """The files of questions and of examples."""
    found = []
    for name, benchmark in settings.benchmarks.items():
        found.append(Reference(("benchmarks", name, "path"), benchmark.path, (FILES,)))
        if benchmark.shots is not None:
            found.append(Reference(("benchmarks", name, "shots"), benchmark.shots, (FILES,)))
    return found


def check_benchmarks(settings: ChoiceSettings) -> None:
    """Raises ConfigError where examples are asked for and nothing gives any."""
    if "num_shots" in settings.model_fields_set and settings.num_shots and settings.benchmarks and not any(
            benchmark.shots for benchmark in settings.benchmarks.values()):
        raise ConfigError("num_shots asks for examples, and no benchmark says where they come from", key="num_shots",
                          hint="Set shots of a benchmark to its training or dev split.")


class Quiz:
    """All benchmarks: the same items for every model.

    notes  what a reader of the report should know; more are added here
    """

    def __init__(self, context: Context, names: Mapping[str, str], notes: list[str]) -> None:
        self.context, self.notes = context, notes
        self.settings: Any = context.settings
        self.reference = names.get(self.settings.reference or "")
        self.items: dict[str, list[Item]] = {}
        self.shots: dict[str, list[Item]] = {}
        self._found: dict[tuple[str, int], dict[str, dict[int, ItemScore]]] = {}  # by benchmark and shots, by model
        for name, benchmark in self.settings.benchmarks.items():
            self._read(name, benchmark)

    def _read(self, name: str, benchmark: Benchmark) -> None:
        items = self._items(benchmark.path, benchmark)
        shots: list[Item] = []
        if benchmark.shots is not None and self.settings.num_shots:
            by_subject: dict[str, list[Item]] = {}
            for shot in self._items(benchmark.shots, benchmark):
                by_subject.setdefault(shot.subject, []).append(shot)
            shots = [shot for own in by_subject.values() for shot in own[:self.settings.num_shots]]
            shown = {shot.solved for shot in shots}
            left = [item for item in items if item.solved not in shown]
            if len(left) < len(items):
                self.notes.append(f"{name}: {len(items) - len(left)} questions are not asked, because they are examples")
            items = left
        if not items:
            raise DataError("holds no question that is not an example too", where=benchmark.path)
        count = min(len(items), self.settings.num_items)
        self.items[name] = [items[place * len(items) // count] for place in range(count)]
        self.shots[name] = shots
        if shots:
            self._note_shots(name)

    def _note_shots(self, name: str) -> None:
        """Tells of questions that get fewer examples than were asked for, or those of other subjects."""
        from danlu.evals.likelihood import examples_of

        items, shots, wanted = self.items[name], self.shots[name], self.settings.num_shots
        subjects = {shot.subject for shot in shots}
        numbers = [len(examples_of(item, shots, wanted)) for item in items]
        few, strange = sum(number < wanted for number in numbers), sum(item.subject not in subjects for item in items)
        if few:
            self.notes.append(f"{name}: {few} of {len(items)} questions have fewer than {wanted} examples before them, "
                              f"{min(numbers)} at least: there are no more for their subjects")
        if strange and len(subjects) > 1:
            self.notes.append(f"{name}: for the subjects of {strange} of {len(items)} questions there are no examples, and "
                              "those of other subjects stand before them")

    def _items(self, path: str, benchmark: Benchmark) -> list[Item]:
        ledger = Ledger()
        items = read_items(path, self.context.base, ledger, benchmark.answers)
        ledger.check()
        if ledger.num_quarantined:
            first = ledger.quarantined[0]
            self.notes.append(f"{ledger.num_quarantined} rows of {path} are no questions and were left out, the first at "
                              f"{first.where}: {first.reason}")
        return items

    def ask(self, name: str, loaded: "Loaded", limit: int | None) -> None:
        """Asks one model everything."""
        from danlu.evals.likelihood import score_items

        for benchmark, items in self.items.items():
            shots = self.shots[benchmark]
            for num_shots in (0, self.settings.num_shots) if shots else (0,):
                with self.context.progress(f"{name}: {benchmark}, {num_shots} shots", total=len(items)) as bar:
                    found = score_items(loaded.root, loaded.tokenizer, items, shots=shots, num_shots=num_shots,
                                        description=self.settings.benchmarks[benchmark].description, limit=limit,
                                        micro_batch_tokens=self.settings.micro_batch_tokens,
                                        progress=lambda done: bar.update(done))
                self._found.setdefault((benchmark, num_shots), {})[name] = found
                cut = sum(score.cut > 0 for score in found.values())
                if cut:
                    self.notes.append(f"{name}: {cut} of {len(items)} prompts of {benchmark} with {num_shots} examples are "
                                      f"longer than its {limit} positions and lose their beginning")

    def rows(self) -> "list[ChoiceRow]":
        """One row for each benchmark, number of examples and model, all over the items that every model could be asked."""
        from danlu.evals.likelihood import choice_row

        rows = []
        for (benchmark, num_shots), by_model in self._found.items():
            common = set.intersection(*(set(found) for found in by_model.values()))
            missing = len(self.items[benchmark]) - len(common)
            if missing:
                self.notes.append(f"{missing} of {len(self.items[benchmark])} questions of {benchmark} with {num_shots} "
                                  "examples have no answer that every model can read, and do not count")
            for name, found in by_model.items() if common else ():
                base = by_model.get(self.reference) if self.reference not in (None, name) else None
                own, other = ({place: scores[place] for place in common} if scores is not None else None
                              for scores in (found, base))
                assert own is not None
                rows.append(choice_row(benchmark, name, num_shots, self.items[benchmark], own, other))
        return rows
