"""What the stage `eval` measures of preferences and of rewards: pairs read by models and judge, and answers drawn.

Only one model is in memory at a time. Each model reads the pairs and draws its answers while it is open; then the
reference says what it thinks of all answers, and then the judge. What could not be compared gets a note and no figure.

    jury = Jury(context, names, notes)
    jury.prefer(name, loaded)                    # for every model …
    jury.hear(name, loaded, answerer, questions, shown)
    jury.ask_reference()
    jury.ask_judge()
    jury.preferences(), jury.rewards()
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from danlu.core.errors import ConfigError, DataError
from danlu.core.ledger import Ledger
from danlu.core.records import Message, Preference
from danlu.evals.figures import Answered, PreferenceRow, RewardRow
from danlu.evals.generative import Answerer, Question, Said
from danlu.evals.preferences import (
    encode_pairs,
    judge_values,
    model_values,
    preference_rows,
    quality_of,
    verdicts,
)
from danlu.evals.rewards import Drawn, draw, judge_scores, reward_row, token_logprobs
from danlu.models.generate import max_positions, stop_ids_of
from danlu.models.load import Loaded, load_model
from danlu.models.root import ScoreRoot
from danlu.models.scorer import load_scorer
from danlu.pipeline.context import TASK, Context
from danlu.pipeline.models import place
from danlu.tasks import task_preferences
from danlu.text.preferences import read_preferences, read_prompts
from danlu.tokens.chat import Chat
from danlu.tokens.codec import vocabulary_of

UNLIMITED = 1 << 30  # tokens, for models that state no limit


@dataclass(slots=True)
class Shown:
    """A greedy answer that the report shows; the judge's score is put in when it is known."""

    answered: Answered
    said: Said | None


@dataclass(frozen=True, slots=True)
class Heard:
    """What one model said: the answers that it drew, None where it was not asked for any, and the greedy ones shown."""

    name: str
    vocabulary: Mapping[str, int]
    drawn: Drawn | None
    shown: Sequence[Shown]

    @property
    def said(self) -> list[Said]:
        """All answers that the judge scores: drawn ones first."""
        drawn = self.drawn.said if self.drawn is not None else []
        return [*drawn, *(item.said for item in self.shown if item.said is not None)]


class Jury:
    """Collects what the models prefer and answer, and asks the reference and the judge about it.

    names  what the models and the judge are called in the report, by what the recipe calls them
    notes  what a reader of the report should know; more are added here
    """

    def __init__(self, context: Context, names: Mapping[str, str], notes: list[str]) -> None:
        self.context, self.names, self.notes = context, names, notes
        self.settings: Any = context.settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.pairs = _pairs(context, notes)
        self.more = _prompts(context, notes)  # that answers are drawn for beside those of tasks
        self.heard: list[Heard] = []
        self._verdicts: dict[tuple[str, str], dict[int, float]] = {}  # by kind and name
        self._values: dict[tuple[str, str], dict[int, tuple[float, float]]] = {}

    # While a model is open ----------------------------------------------------------------------------------------

    def prefer(self, name: str, loaded: Loaded) -> None:
        """Which answers of the pairs the model itself finds more probable."""
        self._compare("model", name, loaded, model_values, stop_ids_of(loaded.lm))

    def hear(self, name: str, loaded: Loaded, answerer: Answerer, questions: Sequence[Question], shown: Sequence[Shown]
             ) -> None:
        """Keeps the model's greedy answers, and draws one for every question; nothing without a judge."""
        if self.settings.judge is None:
            return
        drawn = None
        if questions or self.more:
            with self.context.progress(f"{name}: answers at temperature 1", total=len(questions) + len(self.more)) as bar:
                drawn = draw(answerer, questions, self.context.seed, lambda done: bar.update(done), self.more)
            if drawn.said and self.settings.reference is not None:
                drawn.logprobs = token_logprobs(loaded.root, drawn.said, self.device, self.settings.micro_batch_tokens)
        self.heard.append(Heard(name, vocabulary_of(loaded.tokenizer), drawn if drawn and drawn.said else None, shown))

    def _compare(self, kind: str, name: str, loaded: Any, values: Any, stop_ids: Sequence[int]) -> None:
        if not self.pairs:
            return
        with self.context.progress(f"{name}: {len(self.pairs):,} pairs") as bar:
            try:
                pairs = encode_pairs(loaded.tokenizer, self.pairs, limit=max_positions(loaded.lm) or UNLIMITED,
                                     stop_ids=stop_ids)
            except ConfigError as error:
                self.notes.append(f"{name} was shown no pairs: {error.message}")
                return
            if len(pairs) < len(self.pairs):
                self.notes.append(f"{name} cannot read {len(self.pairs) - len(pairs)} of the {len(self.pairs)} pairs: they "
                                  "are too long for it or refused by its chat template")
            if pairs:
                try:
                    found = values(loaded.root, pairs, self.device, self.settings.micro_batch_tokens)
                    self._verdicts[kind, name], self._values[kind, name] = verdicts(pairs, found), found
                    if kind == "judge":
                        self.notes.append(f"{name}, on {len(found)} pairs: {quality_of(pairs, found).in_words()}")
                except DataError as error:
                    raise DataError(error.message, where=name) from None
            bar.update(len(pairs))

    # Afterwards ---------------------------------------------------------------------------------------------------

    def ask_reference(self) -> None:
        """The reference's log-probabilities of everything that was drawn, by it and by others."""
        drawn = [(heard, heard.drawn) for heard in self.heard if heard.drawn is not None]
        if self.settings.reference is None or not drawn:
            return
        name = self.names[self.settings.reference]
        loaded = load_model(place(self.context.inputs[self.settings.reference]), device=self.device)
        vocabulary, limit = vocabulary_of(loaded.tokenizer), max_positions(loaded.lm) or UNLIMITED
        with self.context.progress(f"{name}: answers of all models", total=len(drawn)) as bar:
            for number, (heard, answers) in enumerate(drawn, 1):
                if heard.vocabulary != vocabulary:
                    self.notes.append(f"{heard.name}: KL was not measured: its vocabulary is not that of {name}")
                elif answers.longest > limit:
                    self.notes.append(f"{heard.name}: KL was not measured: its answers are too long for {name}")
                else:
                    answers.ref_logprobs = token_logprobs(loaded.root, answers.said, self.device,
                                                          self.settings.micro_batch_tokens)
                bar.update(number)

    def ask_judge(self) -> None:
        """The judge's opinion of the pairs, and of everything that was answered."""
        if self.settings.judge is None:
            return
        name = self.names[self.settings.judge]
        loaded = load_scorer(place(self.context.inputs[self.settings.judge]), device=self.device)
        self.notes += [f"{name}: {note}" for note in loaded.notes]
        self._compare("judge", name, loaded, judge_values, ())
        if not self.heard:
            return
        with self.context.progress(f"{name}: answers of all models", total=len(self.heard)) as bar:
            for number, heard in enumerate(self.heard, 1):
                reason = _why_not_scored(heard, loaded)
                if reason:
                    self.notes.append(f"{heard.name} was not scored by {name}: {reason}")
                elif heard.said:
                    self._score(heard, loaded)
                bar.update(number)

    def _score(self, heard: Heard, loaded: Loaded[ScoreRoot]) -> None:
        scores = judge_scores(loaded.root, heard.said, self.device, self.settings.micro_batch_tokens)
        if heard.drawn is not None:
            heard.drawn.scores = scores[:len(heard.drawn.said)]
            scores = scores[len(heard.drawn.said):]
        for item, score in zip((item for item in heard.shown if item.said is not None), scores, strict=True):
            item.answered = replace(item.answered, score=score)

    # What came of it ----------------------------------------------------------------------------------------------

    def preferences(self) -> list[PreferenceRow]:
        """The judge's rows, then the models', all of the same pairs: those that each of them can read."""
        if not self._verdicts:
            return []
        common = set.intersection(*(set(found) for found in self._verdicts.values()))
        if any(len(found) > len(common) for found in self._verdicts.values()):
            self.notes.append(f"the preferences are those of the {len(common)} pairs that all can read")
        if not common:
            return []
        return [row for (kind, name), found in sorted(self._verdicts.items(), key=lambda item: item[0][0] != "judge")
                for row in preference_rows(name, kind, self.pairs, {place: found[place] for place in sorted(common)},
                                           self._values[kind, name])]

    def rewards(self) -> list[RewardRow]:
        """One row for every model whose answers the judge has scored."""
        return [reward_row(heard.name, heard.drawn) for heard in self.heard
                if heard.drawn is not None and heard.drawn.scores is not None]


def _why_not_scored(heard: Heard, judge: Loaded[ScoreRoot]) -> str:
    """Why the judge's scores of these answers would mean nothing; "" where they mean something."""
    if heard.vocabulary != vocabulary_of(judge.tokenizer):
        return "the judge reads another vocabulary"
    limit = max_positions(judge.lm) or UNLIMITED
    if any(len(said.prompt) + len(said.completion.tokens) > limit for said in heard.said):
        return f"its answers and their prompts are longer than the judge's {limit} positions"
    try:
        chat = Chat(judge.tokenizer)
        alike = all(chat.prompt_ids(said.messages) == list(said.prompt) for said in heard.said)
    except (ConfigError, DataError):
        alike = False
    return "" if alike else "the judge's chat template asks in another form"


def _prompts(context: Context, notes: list[str]) -> list[tuple[Message, ...]]:
    """`num_prompts` prompts from each of `judge_prompts`, evenly spread over it, each only once."""
    found: dict[tuple[Message, ...], None] = {}
    for text in context.settings.judge_prompts:
        ledger = Ledger()
        records = list(read_prompts(text, context.base, ledger))
        if ledger.num_quarantined:
            notes.append(f"{ledger.num_quarantined} rows of {text} are no prompts and were left out, the first at "
                         f"{ledger.quarantined[0].where}: {ledger.quarantined[0].reason}")
        if len(records) < context.settings.num_prompts:
            notes.append(f"{text} has {len(records)} prompts, not {context.settings.num_prompts}")
        if not records:
            raise DataError("holds no prompt to draw answers for", where=text)
        count = min(len(records), context.settings.num_prompts)
        found |= dict.fromkeys(records[place * len(records) // count].messages for place in range(count))
    return list(found)


def _pairs(context: Context, notes: list[str]) -> list[Preference]:
    """The pairs of all `preferences`, each only once."""
    found: dict[tuple[Any, ...], Preference] = {}
    for text in context.settings.preferences:
        if context.inputs[text].kind == TASK:
            records = task_preferences(text, context.seed, context.settings.num_pairs, "heldout")
        else:
            ledger = Ledger()
            whole = list(read_preferences(text, context.base, ledger))
            count = min(len(whole), context.settings.num_pairs)
            records = [whole[place * len(whole) // count] for place in range(count)]
            if ledger.num_quarantined:
                notes.append(f"{ledger.num_quarantined} rows of {text} are no preferences and were left out, the first at "
                             f"{ledger.quarantined[0].where}: {ledger.quarantined[0].reason}")
        if not records:
            raise DataError("holds no pair to measure preferences on", where=text)
        if len(records) < context.settings.num_pairs:
            notes.append(f"{text} has {len(records)} pairs, not {context.settings.num_pairs}")
        for record in records:
            found.setdefault((record.messages, record.chosen, record.rejected), record)
    return list(found.values())
