"""Models of a given number of parameters: near it, by the rule, and counted exactly."""

import pytest

from danlu.core.errors import ConfigError
from danlu.models.encoders import KINDS
from danlu.models.load import new_config
from danlu.models.sizes import number_of, parameters_of, shape_table


@pytest.mark.parametrize(("model_type", "kind"), [
    ("llama", "causal"), ("qwen3", "causal"), ("gpt2", "causal"), ("bert", "masked"), ("t5", "pair"), ("bart", "pair")])
def test_a_number_of_parameters_is_met(model_type: str, kind: str) -> None:
    config = new_config({"model_type": model_type, "parameters": "3M"}, None, 2000, kind)
    number = parameters_of(config, kind)
    assert abs(number / 3e6 - 1) < 0.05
    real = KINDS[kind].auto.from_config(config)
    assert number == sum(parameter.numel() for parameter in real.parameters())
    table = shape_table(config, kind)
    assert f"{number:,}" in table["parameters"] and table["vocabulary"].startswith("2,000, tied")
    parts = [int(part.rsplit(" ", 1)[1].replace(",", "")) for part in
             table["parameters"].partition("(")[2].rstrip(")").split(", ")]
    assert sum(parts) == number


def test_settings_that_are_named_stay() -> None:
    config = new_config({"model_type": "llama", "parameters": "2M", "max_position_embeddings": 77}, None, 1000)
    assert config.max_position_embeddings == 77 and config.head_dim == 32 and config.tie_word_embeddings


@pytest.mark.parametrize(("text", "number"), [("30M", 30_000_000), ("1.5b", 1_500_000_000), (400, 400), ("12k", 12_000)])
def test_numbers_as_people_write_them(text: object, number: int) -> None:
    assert number_of(text) == number


@pytest.mark.parametrize(("architecture", "message"), [
    ({"model_type": "llama", "parameters": "many"}, "“many” is no number of parameters"),
    ({"model_type": "bloom", "parameters": "3M"}, "the shape of a bloom model"),
    ({"model_type": "llama", "parameters": "1K"}, "no llama of 1,000 parameters has this vocabulary")])
def test_what_cannot_be_is_said(architecture: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        new_config(architecture, None, 1000)


@pytest.mark.parametrize("keys", [{"num_attention_heads": 7}, {"num_key_value_heads": 3}, {"hidden_size": 96}])
def test_widths_that_do_not_go_with_given_settings_are_passed_over(keys: dict) -> None:
    config = new_config({"model_type": "llama", "parameters": "3M", **keys}, None, 500)
    assert {name: config.to_dict()[name] for name in keys} == keys
    assert config.num_attention_heads % config.num_key_value_heads == 0
    assert parameters_of(config, "causal") == pytest.approx(3e6, rel=0.1)


def test_settings_with_which_no_width_goes() -> None:
    with pytest.raises(ConfigError, match="a gpt2 model cannot be built so"):
        new_config({"model_type": "gpt2", "parameters": "3M", "n_embd": 100, "n_head": 7}, None, 500)


@pytest.mark.parametrize(("architecture", "kind", "message"), [
    ({"model_type": "gpt2", "n_embd": 256, "n_layer": 4}, "causal", "must be divisible by num_heads"),
    ({"model_type": "bert", "hidden_size": 256, "num_hidden_layers": 4}, "masked", "not a multiple of the number of"),
    ({"model_type": "bart", "d_model": 100}, "pair", "must be divisible by num_heads"),
    ({"model_type": "modernbert", "hidden_size": 100, "num_attention_heads": 3}, "masked", "not a multiple of the number"),
    ({"model_type": "bert", "parameters": "400K", "hidden_act": "foo"}, "masked", "cannot be built so: 'foo'"),
    ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 5}, "causal", "cannot be built so"),
    ({"model_type": "llama", "num_attention_heads": 7, "hidden_size": 56, "num_key_value_heads": 3}, "causal",
     "7 attention heads cannot share 3"),
    ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 0}, "causal", "num_attention_heads is 0"),
    ({"model_type": "llama", "num_hidden_layers": -1}, "causal", "num_hidden_layers is -1"),
    ({"model_type": "llama", "vocab_size": 200}, "causal", "vocab_size is 200, and the tokenizer has 300 ids"),
    ({"model_type": "llama", "parameters": "1M", "vocab_size": 200}, "causal", "vocab_size is 200, and the tokenizer"),
    ({"model_type": ["llama"]}, "causal", "is no model type")])
def test_a_shape_that_cannot_be_is_said_before_a_model_is_made(architecture: dict, kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        new_config(architecture, None, 300, kind)
    assert caught.value.key.startswith("model")


@pytest.mark.parametrize("layers", [2, 6])
def test_a_given_depth_takes_the_nearest_width(layers: int) -> None:
    config = new_config({"model_type": "llama", "parameters": "3M", "num_hidden_layers": layers}, None, 500)
    assert config.num_hidden_layers == layers and parameters_of(config, "causal") == pytest.approx(3e6, rel=0.15)


def test_a_family_whose_padding_lies_beyond_a_small_vocabulary() -> None:
    config = new_config({"model_type": "modernbert", "parameters": "1M"}, None, 400, "masked")
    assert parameters_of(config, "masked") == pytest.approx(1e6, rel=0.2)
