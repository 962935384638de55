"""QLoRA where it cannot be: a clear message; and that adapters trained beside rounded weights go into unrounded ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_chat import make_folder
from torch import nn
from transformers import AutoModelForCausalLM

from danlu.core.errors import ConfigError
from danlu.models import load
from danlu.models.adapters import AdapterConfig
from danlu.models.load import load_model, save_model
from danlu.models.scorer import load_scorer

QLORA = AdapterConfig(finetuning_type="lora", lora_rank=4, quantization_bit=4)
IDS = torch.arange(3, 40)[None]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine could")
def test_a_machine_without_a_gpu_says_so(tmp_path: Path) -> None:
    make_folder(tmp_path)
    with pytest.raises(ConfigError, match=r"quantization_bit 4 needs a CUDA device.*\n.*Leave quantization_bit out"):
        load_model(tmp_path, adapters=QLORA)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package bitsandbytes"):
        load_model(tmp_path, adapters=QLORA)


def test_a_scorer_is_not_quantised(tmp_path: Path) -> None:
    make_folder(tmp_path)
    with pytest.raises(ConfigError, match="not trained quantised"):
        load_scorer(tmp_path, new_head=True, adapters=QLORA)


def rounded(lm: nn.Module) -> nn.Module:
    """Linear layers with 4 bits for each weight, as a stand-in for a quantised model."""
    for name, module in lm.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            step = module.weight.abs().max() / 7
            module.weight.data = (module.weight / step).round() * step
    return lm


def test_adapters_are_merged_into_the_unquantised_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "base")
    original = AutoModelForCausalLM.from_pretrained
    asked: list[dict[str, Any]] = []

    def open_rounded(source: str, quantization_config: object = None, **options: Any) -> Any:
        asked.append({"source": source, "quantised": quantization_config is not None})
        found = original(source, **options)
        if quantization_config is not None:
            rounded(found[0])
        return found

    monkeypatch.setattr(load, "opening_options", lambda bits: {"quantization_config": bits} if bits else {})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", open_rounded)
    loaded = load_model(tmp_path / "base", adapters=QLORA)
    with torch.no_grad():
        for name, value in loaded.root.named_parameters():
            if "lora_B" in name:
                value.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    (tmp_path / "out").mkdir()
    save_model(loaded, tmp_path / "out", [2])
    assert [item["quantised"] for item in asked] == [True, False]
    saved = original(tmp_path / "out")
    base = original(tmp_path / "base")
    layer = "model.layers.0.input_layernorm.weight"
    assert torch.equal(saved.get_parameter(layer), base.get_parameter(layer))
    expected = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()(input_ids=IDS).logits
    torch.testing.assert_close(saved(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    in_rounded = PeftModel.from_pretrained(rounded(original(tmp_path / "base")), tmp_path / "out" / "adapter").eval()
    assert not torch.allclose(saved(input_ids=IDS).logits, in_rounded(input_ids=IDS).logits, atol=1e-2)
