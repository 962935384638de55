"""Forecasts of what is trained, beside models that are really built."""

import pytest
from small_models import CONFIGS, VOCAB, make_root

from danlu.models.adapters import AdapterConfig, choose_trained
from danlu.models.flops import size_of


@pytest.mark.parametrize("kind", ["llama", "mistral-window"])
@pytest.mark.parametrize("settings", [
    {}, {"train_rows_from": 60}, {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    {"finetuning_type": "freeze", "freeze_trainable_layers": -2, "train_rows_from": 90},
    {"finetuning_type": "freeze", "freeze_trainable_layers": 0, "train_rows_from": 1},
    {"finetuning_type": "lora", "lora_rank": 3}, {"finetuning_type": "lora", "use_rslora": True}])
def test_trained_parameters_are_those_of_the_model(kind: str, settings: dict) -> None:
    root = make_root(kind, probe=False)
    config = AdapterConfig(**settings)
    choose_trained(root.lm, config, 0)
    trained = sum(value.numel() for value in root.lm.parameters() if value.requires_grad)
    size = size_of(CONFIGS[kind])
    assert size.vocab == VOCAB and size.trained_parameters(config) == trained
