"""Stage `dpo`: direct preference optimisation of a chat model against a reference, whose opinion is computed once.

    preferred: {stage: dpo, model: chat, dataset: [preferences.jsonl, task:skills], pref_beta: 0.1}

The reference is the model as it is before training (with its adapters, if it goes on from some), or `ref_model`. Its
log-probabilities are a column of the examples; those that the data bring along are used as they are.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator

from danlu.models.adapters import AdapterConfig
from danlu.pipeline.context import FILES, HUB, Amount, Context, Forecast, Input, Reference
from danlu.pipeline.examples import Prepared
from danlu.pipeline.models import adapter_of, identities, model_config, place, require_same_vocabulary, tokenizer_of
from danlu.pipeline.pairs import PairConfig, check_pairs, pair_references, prepare_pairs
from danlu.pipeline.reference import with_reference
from danlu.pipeline.training import Compute, MachineConfig, forecast_training, run_training
from danlu.train.trainer import TrainSettings

KIND = "model"
SCHEMA = 1
RESUMES = True
DISTRIBUTED = True


class Settings(PairConfig, TrainSettings, AdapterConfig, MachineConfig):
    """The keys of a preference step."""

    model: str = Field(description="a step, folder or hub id: the model that is trained")
    ref_model: str | None = Field(None, description="the reference; default: the model before training")
    pref_beta: float = Field(0.1, gt=0, description="how strongly the model is held to the reference")
    pref_loss: Literal["sigmoid"] = Field("sigmoid", description="the loss of a pair: sigmoid is DPO")
    rpo_alpha: float | None = Field(None, ge=0, description="weight of the language modelling loss of the chosen answer")
    rpo_form: Literal["additive", "scaled"] = Field(
        "additive", description="additive: loss + alpha · nll; scaled: alpha · loss + nll, as older trainers have it")

    @model_validator(mode="after")
    def _dpo_reads_all(self) -> "Settings":
        if "rpo_form" in self.model_fields_set and self.rpo_alpha is None:
            raise ValueError("rpo_form is read with rpo_alpha only")
        return self


def references(settings: Settings) -> list[Reference]:
    """The models and the data."""
    found = pair_references(settings)
    if settings.ref_model is not None:
        found.append(Reference(("ref_model",), settings.ref_model, ("model", FILES, HUB)))
    return found


def forecast(settings: Settings, inputs: Mapping[str, Input]) -> Forecast:
    """The policy's passes, and the reference's one pass, which costs a third of an epoch."""
    found = forecast_training(settings, inputs, model_config(settings, inputs), share_learned=0.7, task_tokens=32,
                              mean_length=min(settings.cutoff_len, 300))
    more = 1 + 1 / (3 * settings.num_train_epochs) if settings.max_steps is None else 4 / 3

    def grown(amount: Amount | None) -> Amount | None:
        return None if amount is None else Amount(amount.value * more, amount.exact)

    return replace(found, flops=grown(found.flops), seconds=grown(found.seconds))


def check(settings: Settings, inputs: Mapping[str, Input]) -> None:
    """Whether the steps fit together."""
    check_pairs(settings, inputs)


def run(context: Context) -> dict[str, Any]:
    """Reads, encodes, asks the reference, trains and saves."""
    from danlu.models.load import Loaded, load_model, load_tokenizer, save_model, without_dropout
    from danlu.objectives.preference import DPO

    settings = context.settings
    source = tokenizer_of(context)
    tokenizer = load_tokenizer(source)
    prepared, stop_ids = prepare_examples(context, tokenizer)

    def load() -> Loaded:
        loaded = load_model(source, tokenizer=tokenizer, adapters=settings, adapter=adapter_of(context), seed=context.seed)
        without_dropout(loaded.lm)
        return loaded

    def attach(prepared: Prepared, compute: Compute, root: Any) -> Prepared:
        return with_reference(context, prepared, compute, lambda: _reference(context, compute, tokenizer, root),
                              identities(context, *(["ref_model"] if settings.ref_model else
                                                    ["model", "adapter_name_or_path"])))

    return run_training(context, settings, prepared, load, lambda loaded, folder: save_model(loaded, folder, stop_ids),
                        objective=DPO(settings.pref_beta, settings.pref_loss, settings.rpo_alpha, settings.rpo_form),
                        attach=attach)


def _reference(context: Context, compute: Compute, tokenizer: Any, root: Any) -> Any:
    """The root of the reference: the model itself, which has not been trained yet, or another one."""
    from danlu.models.load import load_model
    from danlu.train.parallel import shard

    if context.settings.ref_model is None:
        return root
    folder = place(context.inputs[context.settings.ref_model])
    require_same_vocabulary(tokenizer, folder, "ref_model")
    loaded = load_model(folder, tokenizer=tokenizer)
    return shard(compute.ready(loaded, context.settings, context).root, compute.world)


def prepare_examples(context: Context, tokenizer: Any) -> tuple[Prepared, list[int]]:
    """The step's pairs as Examples on disk, and the ids that end a turn."""
    return prepare_pairs(context, tokenizer, reference=True)
