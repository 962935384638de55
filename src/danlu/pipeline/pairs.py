"""What the stages on preferences share: their data, as Examples of one prompt and two answers on disk."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Literal

from pydantic import Field

from danlu.core.errors import ConfigError
from danlu.core.ledger import Ledger
from danlu.core.records import Preference
from danlu.pipeline.context import FILES, TASK, Context, Input, Reference
from danlu.pipeline.examples import DataConfig, Prepared, Recipe, first, prepare, record_bytes, split_by_hash
from danlu.pipeline.models import adapter_of, identities, model_config, model_references, place
from danlu.pipeline.training import DEFAULT_TASK_PROMPTS, all_texts, check_evaluation
from danlu.tasks import made_preferences, task, task_preferences
from danlu.text.formats import read_dialogues
from danlu.text.preferences import read_preferences

ROOM = 8  # tokens that a sampled answer may have beyond the bytes of the longest right one
KEYS = ("dataset", "eval_dataset", "val_size", "cutoff_len", "max_samples", "category", "overlong",
        "make_rejected", "strict")


class PairConfig(DataConfig):
    """Preferences, or dialogues for which a rejected answer is made."""

    overlong: Literal["turns", "tokens", "drop", "error"] = Field(
        "turns", description="pairs longer than cutoff_len: leave out oldest turns, cut the answers, drop, or stop")
    make_rejected: bool = Field(
        False, description="the files hold dialogues: reject another dialogue's answer, or the answer out of form")
    sample_rejected: bool = Field(
        False, description="prompts of tasks: where the model itself answers wrongly, that is the rejected answer")
    strict: bool = Field(False, description="stop at the first bad record instead of counting it")


def pair_references(settings: Any) -> list[Reference]:
    """The model and the data."""
    return [*model_references(settings), *(Reference(key, text, (FILES, TASK)) for key, text in all_texts(settings))]


def check_pairs(settings: Any, inputs: Mapping[str, Input]) -> None:
    """The length against the model's positions, and settings that nothing would read."""
    from danlu.models.load import check_length

    if settings.sample_rejected and all(inputs[text].kind != TASK for _, text in all_texts(settings)):
        raise ConfigError("“sample_rejected” needs a task, whose scorer knows what is wrong", key="sample_rejected")
    unread = sorted({"strict", "category", "make_rejected"} & settings.model_fields_set)
    if unread and all(inputs[text].kind == TASK for _, text in all_texts(settings)):
        raise ConfigError(f"“{unread[0]}” says how files are read, and this step reads none", key=unread[0])
    check_evaluation(settings, settings.eval_dataset is not None or settings.val_size > 0)
    config = model_config(settings, inputs)
    if config is not None:
        check_length(config, settings.cutoff_len)


def prepare_pairs(context: Context, tokenizer: Any, reference: bool) -> tuple[Prepared, list[int]]:
    """The step's preferences as Examples on disk, and the ids that end a turn.

    reference  whether every token gets a column for what a reference says of it
    """
    from danlu.tokens.encode import Encoder
    from danlu.tokens.pairs import PairEncoder

    settings = context.settings
    encoder = Encoder(tokenizer, settings.cutoff_len)
    encoder.check()
    pairs = PairEncoder(encoder, settings.overlong, reference)

    def read(ledger: Ledger, held_out_ledger: Ledger) -> tuple[Iterable[Preference], Iterable[Preference]]:
        train = chain.from_iterable(_preferences(context, text, ledger, "train") for text in settings.datasets())
        if settings.eval_dataset is not None:
            return train, chain.from_iterable(_preferences(context, text, held_out_ledger, "heldout")
                                              for text in settings.eval_datasets())
        return split_by_hash(train, settings.val_size, ledger)

    chosen = {name: getattr(settings, name) for name in KEYS} | {"reference": reference}
    if settings.sample_rejected:
        chosen["sampled by"] = identities(context, "model", "adapter_name_or_path")
    return prepare(context, Recipe(chosen, tokenizer, read, pairs.preferences)), encoder.chat.stop_ids


def _preferences(context: Context, text: str, ledger: Ledger, split: Literal["train", "heldout"]) -> Iterable[Preference]:
    settings = context.settings
    if context.inputs[text].kind == TASK:
        count = settings.max_samples or DEFAULT_TASK_PROMPTS
        found = task_preferences(text, context.seed, count, split)
        return _sampled(context, text, found) if settings.sample_rejected else found
    category = settings.category or "preference"
    if settings.make_rejected:
        dialogues = read_dialogues(text, context.base, ledger, category=category, strict=settings.strict)
        records: Iterable[Preference] = _made(context, dialogues, ledger, text)
    else:
        records = read_preferences(text, context.base, ledger, category=category, strict=settings.strict)
    return first(records, settings.max_samples, ledger, text)


def _sampled(context: Context, text: str, records: list[Preference]) -> Iterator[Preference]:
    """The records with the model's own mistakes; it is opened when the first of them is asked for."""
    from danlu.models.load import load_model
    from danlu.rollout.preferences import sampled_preferences

    settings = context.settings
    longest = max((len(record.chosen.encode()) for record in records), default=0)
    loaded = load_model(place(context.inputs[settings.model]), adapters=settings if settings.adapter_name_or_path else None,
                        adapter=adapter_of(context), seed=context.seed)
    yield from sampled_preferences(loaded, task(text), records, context.seed, max_new_tokens=longest + ROOM)


def _made(context: Context, dialogues: Iterable[Any], ledger: Ledger, text: str) -> Iterator[Preference]:
    """Preferences made of dialogues; those that none can be made of are counted."""
    station = ledger.station(f"make rejected:{text}")

    def counted() -> Iterator[Any]:
        for dialogue in dialogues:
            station.take(rows=1, bytes=record_bytes(dialogue))
            yield dialogue

    came = went = rows = 0
    for record in made_preferences(counted(), context.seed):
        if record is not None:
            rows, went = rows + 1, went + record_bytes(record)
            yield record
    came = station.came.bytes
    station.give(rows=rows, bytes=went)
    if station.came.rows > rows:
        station.drop("no rejected answer could be made", rows=station.came.rows - rows)
    if went > came:
        station.add("rejected answers", bytes=went - came)
    elif came > went:
        station.drop("turns after the last answer, and dialogues without a pair", bytes=came - went)
