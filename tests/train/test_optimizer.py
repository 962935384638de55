"""The optimizer is torch's AdamW with transformers' split of parameters, and it gives the same bits every time."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from pydantic import ValidationError
from small import make_trainer, tiny_root, weights
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM, Trainer

from danlu.core.errors import ConfigError
from danlu.models.adapters import AdapterConfig
from danlu.train.optimizer import OptimizerConfig, build_optimizer, parameter_groups, set_learning_rate

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
         "intermediate_size": 24, "vocab_size": 20, "head_dim": 8}


def decay_groups(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters that decay, and those that do not."""
    groups = parameter_groups(model, OptimizerConfig(weight_decay=0.1), {})
    return [[parameter for group in groups if (group["weight_decay"] > 0) == decays for parameter in group["params"]]
            for decays in (True, False)]


@pytest.mark.parametrize("model", [
    Qwen3ForCausalLM(Qwen3Config(**SIZES, attention_bias=True)),
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20)),
], ids=["qwen3", "gpt2"])
def test_what_decays_is_what_decays_in_transformers(model: nn.Module) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    theirs = set(Trainer.get_decay_parameter_names(None, model)) & set(names.values())
    decaying, plain = decay_groups(model)
    assert {names[id(parameter)] for parameter in decaying} == theirs
    assert {names[id(parameter)] for parameter in plain} == set(names.values()) - theirs


def test_fifty_steps_are_those_of_torch() -> None:
    """Against the plain, unfused AdamW in double precision; only the matrix decays."""
    torch.manual_seed(0)
    ours = nn.Linear(5, 3).double()
    theirs = nn.Linear(5, 3).double()
    theirs.load_state_dict(ours.state_dict())
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    optimizer = build_optimizer(ours, config)
    reference = torch.optim.AdamW([{"params": [theirs.weight], "weight_decay": 0.1, "scale": 1.0},
                                   {"params": [theirs.bias], "weight_decay": 0.0, "scale": 1.0}],
                                  lr=0.01, betas=(0.8, 0.95), eps=1e-6, fused=False, foreach=False)
    for step in range(50):
        rate = 0.01 * (1 - step / 50)
        set_learning_rate(optimizer, rate)
        set_learning_rate(reference, rate)
        x = torch.randn(7, 5, dtype=torch.float64)
        for model, each in ((ours, optimizer), (theirs, reference)):
            each.zero_grad()
            model(x).square().sum().backward()
            each.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-12, atol=1e-14)


def test_frozen_parameters_are_left_out_and_tied_ones_come_once() -> None:
    root = tiny_root(tied=True)
    decaying, plain = decay_groups(root)
    assert len({id(parameter) for parameter in decaying + plain}) == len(decaying + plain) == len(weights(root))
    for parameter in root.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="no trainable"):
        build_optimizer(root, OptimizerConfig())
    next(root.parameters()).requires_grad_(True)
    assert len(build_optimizer(root, OptimizerConfig()).param_groups) == 1


def test_the_same_training_gives_the_same_bits(tmp_path) -> None:
    torch.set_num_threads(1)
    results = []
    for name in ("first", "second"):
        trainer = make_trainer(tmp_path / name)
        list(trainer.fit())
        results.append(weights(trainer.root))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def adapted(target: list[str]) -> nn.Module:
    """A model with its own head and adapters, also on the embeddings and with a bias and a magnitude where asked for."""
    lm = Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=False))
    return get_peft_model(lm, LoraConfig(r=2, target_modules=target, use_dora="q_proj" in target, bias="lora_only",
                                         modules_to_save=["norm"]))


@pytest.mark.parametrize("target", [["q_proj", "embed_tokens"], ["down_proj"]])
def test_the_groups_of_lora_plus_are_those_of_peft(target: list[str]) -> None:
    model = adapted(target)
    config = OptimizerConfig(learning_rate=2e-3, loraplus_lr_ratio=16, weight_decay=0.1,
                             **({"loraplus_lr_embedding": 3e-5} if "embed_tokens" in target else {}))
    ours = build_optimizer(model, config, {})
    set_learning_rate(ours, 2e-3)
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=2e-3, loraplus_lr_ratio=16,
                                       loraplus_weight_decay=0.1, loraplus_lr_embedding=3e-5)
    rates = [{parameter: group["lr"] for group in each.param_groups for parameter in group["params"]}
             for each in (ours, theirs)]
    names = {parameter: name for name, parameter in model.named_parameters()}
    mine, peers = ({names[parameter]: rate for parameter, rate in each.items()} for each in rates)
    assert mine == pytest.approx(peers) and set(mine) == set(peers)
    assert len(set(rates[0].values())) == (3 if "embed_tokens" in target else 2)


def test_lora_plus_multiplies_the_rate_of_a_part() -> None:
    model = adapted(["down_proj"])
    config = OptimizerConfig(learning_rate=1e-3, loraplus_lr_ratio=4)
    assert {group["scale"] for group in parameter_groups(model, config, {"base_model.": 3.0})} == {3.0, 12.0}
    assert {group["scale"] for group in parameter_groups(model, OptimizerConfig(), {"base_model.": 3.0})} == {3.0}


def test_rates_that_nothing_would_read_are_refused() -> None:
    with pytest.raises(ValidationError, match="loraplus_lr_embedding is read with loraplus_lr_ratio only"):
        OptimizerConfig(loraplus_lr_embedding=1e-5)
    with pytest.raises(ConfigError, match="the embeddings have no adapters"):
        build_optimizer(adapted(["down_proj"]), OptimizerConfig(loraplus_lr_ratio=4, loraplus_lr_embedding=1e-5))

    class Both(OptimizerConfig, AdapterConfig):
        """As stages have them."""

    with pytest.raises(ValidationError, match="loraplus_lr_ratio is read with finetuning_type: lora only"):
        Both(loraplus_lr_ratio=4)
    assert Both(loraplus_lr_ratio=4, finetuning_type="lora").loraplus_lr_ratio == 4
