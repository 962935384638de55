"""LoRA through peft: what is trained, what is saved, and that merging changes nothing."""

from pathlib import Path

import pytest
import torch
from small_models import make_root, random_examples
from tiny_chat import make_folder
from transformers import AutoModelForCausalLM

from danlu.core.errors import ConfigError
from danlu.models.adapters import AdapterConfig, add_adapters
from danlu.models.load import load_model, save_model
from danlu.models.root import Root
from danlu.objectives.language import Language

LORA = AdapterConfig(finetuning_type="lora", lora_rank=4)


def train_a_little(root: Root) -> None:
    optimizer = torch.optim.AdamW([p for p in root.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(3):
        examples = [e for e in random_examples(seed, 6) if e.num_targets]
        batch = root.batch(examples)
        root(batch, coefficients_S=Language().coefficients(batch)).total.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_only_adapters_learn_and_the_merged_model_equals_base_plus_adapter(tmp_path: Path) -> None:
    from peft import PeftModel

    make_folder(tmp_path / "base")
    loaded = load_model(tmp_path / "base", adapters=LORA, seed=1)
    trainable = [name for name, p in loaded.root.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    assert loaded.root.packs
    before = {name: p.clone() for name, p in loaded.root.named_parameters() if "lora_" not in name}
    train_a_little(loaded.root)
    for name, value in before.items():
        assert torch.equal(value, dict(loaded.root.named_parameters())[name]), name
    ids = torch.arange(3, 40)[None]
    (tmp_path / "out").mkdir()
    save_model(loaded, tmp_path / "out", [2])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = base(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    torch.testing.assert_close(merged(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged(input_ids=ids).logits, plain, atol=1e-2), "something was learned"


def test_adapters_start_alike_and_change_nothing_at_first() -> None:
    one, two = make_root("llama", torch.float32), make_root("llama", torch.float32)
    examples = random_examples(4, 4)
    plain = one(one.batch(examples)).logprobs_S
    add_adapters(one.lm, LORA, seed=7)
    add_adapters(two.lm, LORA, seed=7)
    torch.testing.assert_close(one(one.batch(examples)).logprobs_S, plain)
    left, right = dict(one.named_parameters()), dict(two.named_parameters())
    assert all(torch.equal(left[name], right[name]) for name in left if "lora_" in name)


def test_an_unknown_target_is_named() -> None:
    root = make_root("llama", torch.float32)
    with pytest.raises(ConfigError, match=r"“q_pro” is no linear layer of LlamaForCausalLM\n.*Did you mean q_proj"):
        add_adapters(root.lm, AdapterConfig(finetuning_type="lora", lora_target=["q_pro"]), 0)


def test_the_head_is_no_target() -> None:
    root = make_root("qwen3", torch.float32)
    with pytest.raises(ConfigError, match="lm_head"):
        add_adapters(root.lm, AdapterConfig(finetuning_type="lora", lora_target=["lm_head"]), 0)
