"""Stage `rm`: a reward model from preferences, trained pair by pair from a chat model (−log σ of the scores' difference).

    judge: {stage: rm, model: chat, dataset: [preferences.jsonl, task:skills]}

The score of an answer is read at its last token, the one that ends the turn. The artifact opens as
`AutoModelForSequenceClassification` with one label.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from danlu.models.adapters import AdapterConfig
from danlu.pipeline.context import Context, Forecast, Input, Reference
from danlu.pipeline.examples import Prepared
from danlu.pipeline.models import adapter_of, model_config, tokenizer_of
from danlu.pipeline.pairs import PairConfig, check_pairs, pair_references, prepare_pairs
from danlu.pipeline.training import MachineConfig, forecast_training, run_training
from danlu.train.trainer import TrainSettings

KIND = "reward_model"
SCHEMA = 1
RESUMES = True
DISTRIBUTED = True


class Settings(PairConfig, TrainSettings, AdapterConfig, MachineConfig):
    """The keys of a reward model's step."""

    model: str = Field(description="a step, folder or hub id: the model that learns to judge")
    center_rewards_coefficient: float = Field(0.0, ge=0, description="pulls the mean score of a pair towards 0")


def references(settings: Settings) -> list[Reference]:
    """The model and the data."""
    return pair_references(settings)


def forecast(settings: Settings, inputs: Mapping[str, Input]) -> Forecast:
    """No vocabulary head: nothing but the trunk is computed."""
    return forecast_training(settings, inputs, model_config(settings, inputs), share_learned=0.0, task_tokens=32,
                             mean_length=min(settings.cutoff_len, 300))


def check(settings: Settings, inputs: Mapping[str, Input]) -> None:
    """Whether the steps fit together."""
    check_pairs(settings, inputs)


def run(context: Context) -> dict[str, Any]:
    """Reads, encodes, trains and saves."""
    from danlu.models.load import Loaded, load_tokenizer
    from danlu.models.scorer import load_scorer, padding_token, save_scorer
    from danlu.objectives.reward import Pairwise

    settings = context.settings
    source = tokenizer_of(context)
    tokenizer = load_tokenizer(source)
    prepared, stop_ids = prepare_examples(context, tokenizer)
    padding_token(tokenizer, stop_ids)  # where there is none, that is said now rather than when a trained model is saved

    def load() -> Loaded:
        return load_scorer(source, tokenizer=tokenizer, new_head=True, adapters=settings, adapter=adapter_of(context),
                           seed=context.seed)

    return run_training(context, settings, prepared, load, lambda loaded, folder: save_scorer(loaded, folder, stop_ids),
                        objective=Pairwise(settings.center_rewards_coefficient))


def prepare_examples(context: Context, tokenizer: Any) -> tuple[Prepared, list[int]]:
    """The step's pairs as Examples on disk, and the ids that end a turn."""
    return prepare_pairs(context, tokenizer, reference=False)
