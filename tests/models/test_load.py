"""Loading: what packs, what falls back with a message, and what is refused."""

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import CONFIGS, make_root, random_examples
from transformers import AutoModelForCausalLM, GenerationConfig

from danlu.core.errors import ConfigError
from danlu.data.batch import Batch
from danlu.models import attention
from danlu.models.load import (
    check_length,
    load_config,
    load_model,
    load_tokenizer,
    new_config,
    new_model,
    save_model,
    why_not_packed,
)
from danlu.models.root import Root, check_head
from danlu.tokens.train import train_bpe

PACKS = ["llama", "qwen3", "mistral-window", "granite", "cohere", "gpt2"]


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_kind_gives_the_logprobs_of_plain_transformers(kind: str) -> None:
    root = make_root(kind, torch.float32)
    assert root.packs == (kind in PACKS)
    plain = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[kind]), dtype=torch.float32,
                                             attn_implementation="eager").eval()
    plain.load_state_dict(root.lm.state_dict())
    root.eval()
    for example in random_examples(5, 4):
        reading = root(root.batch([example])).logprobs_S
        expected = []
        for branch in example.branches:
            ids = torch.tensor([[*example.stem, *branch.tokens]])
            logp = plain(input_ids=ids).logits[0].log_softmax(-1)
            for place, weight in enumerate(branch.weights, len(example.stem)):
                if weight and place:
                    expected.append(logp[place - 1, ids[0, place]])
        if expected:
            torch.testing.assert_close(reading, torch.stack(expected), rtol=2e-4, atol=2e-4)


def test_a_model_that_cannot_pack_says_why() -> None:
    root = make_root("gemma2", torch.float32, probe=False)
    assert "soft cap" in (why_not_packed(root) or "")
    assert root.lm.config._attn_implementation == "sdpa"


def test_positions_that_depend_on_the_row_are_not_packed() -> None:
    root = make_root("llama", torch.float32, probe=False)
    root.lm.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert "dynamic" in (why_not_packed(root) or "")


def test_an_unknown_change_of_the_logits_is_refused() -> None:
    root = make_root("granite", torch.float32)
    root.shape = type(root.shape)()  # as if the scale were unknown
    with pytest.raises(ConfigError, match="does something to its logits"):
        root.lm.set_attn_implementation("sdpa")
        check_head(root)


def test_attention_without_a_layout_raises() -> None:
    root = make_root("llama", torch.float32)
    with pytest.raises(attention.UnsupportedAttention):
        root.lm(input_ids=torch.tensor([[1, 2, 3]]))


def test_the_layout_function_is_the_mask_of_the_batch() -> None:
    """The tree attention against one dense masked attention over the whole row."""
    torch.manual_seed(0)
    examples = random_examples(9, 5)
    layout = Batch.pack(examples).layout
    length = len(layout.documents_T)
    q, k, v = torch.randn(1, 4, length, 8), torch.randn(1, 2, length, 8), torch.randn(1, 2, length, 8)
    module = torch.nn.Module()
    own, _ = attention.packed_attention(module, q, k, v, None, layout=layout)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask(), enable_gqa=True)
    torch.testing.assert_close(own, dense.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_a_row_longer_than_the_positions_is_refused() -> None:
    with pytest.raises(ConfigError, match="cutoff_len is 5000"):
        check_length(CONFIGS["llama"], 5000)
    check_length(CONFIGS["llama"], 2048)


def test_a_head_that_is_no_projection_is_refused() -> None:
    root = make_root("llama", torch.float32)
    root.lm.set_output_embeddings(torch.nn.Bilinear(2, 2, 2))
    with pytest.raises(ConfigError, match="Bilinear"):
        Root(root.lm)


@pytest.fixture()
def saved(tmp_path):
    """A folder with a model and a tokenizer."""
    train_bpe(["a few words of text"], 300, tmp_path)
    new_model({"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
              load_tokenizer(tmp_path)).lm.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("settings", "message"), [
    ({"hidden_size": 256, "num_attention_heads": 7}, "cannot be built so"),
    ({"hidden_size": "big"}, "cannot be built so"),
    ({"hiden_size": 256}, "has no setting “hiden_size”"),
    ({"model_type": "lama"}, "“lama” is no model type"),
    ({"model_type": "t5"}, "“t5” is no causal language model"),
])
def test_an_architecture_that_cannot_be_is_said(saved, settings, message) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        new_config(settings, load_tokenizer(saved))
    assert caught.value.key.startswith("model")


def test_a_cut_file_of_weights_is_named(saved) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ConfigError, match="no causal language model could be opened"):
        load_model(saved)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(ConfigError, match="no causal language model could be opened"):
        load_model(saved)


def test_weights_that_are_missing_are_named(saved) -> None:
    tensors = load_file(saved / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"has no weights for model\.layers\.0\.mlp\.up_proj\.weight"):
        load_model(saved)


def test_a_config_that_is_broken_is_named(saved) -> None:
    (saved / "config.json").write_text('{"model_type": "llama", "hidden_size": "big"}')
    with pytest.raises(ConfigError, match="no model could be opened"):
        load_config(saved)


def test_ids_with_holes_count_up_to_the_highest(saved) -> None:
    tokens = json.loads((saved / "tokenizer.json").read_text())
    tokens["model"]["vocab"][max(tokens["model"]["vocab"], key=tokens["model"]["vocab"].get)] = 400
    (saved / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(ConfigError, match=r"ids go up to 400; the model has \d+ rows only"):
        load_model(saved)


def test_the_generation_settings_of_a_checkpoint_travel_along(saved, tmp_path) -> None:
    loaded = load_model(saved)
    loaded.lm.generation_config = GenerationConfig(eos_token_id=[1, 7], do_sample=True, temperature=0.6)
    (tmp_path / "out").mkdir()
    save_model(loaded, tmp_path / "out", [5])
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert found.eos_token_id == [1, 5, 7] and found.temperature == 0.6
    loaded.lm.generation_config = GenerationConfig(eos_token_id=[1, 7], do_sample=False, temperature=0.6,
                                                         suppress_tokens=[9])
    save_model(loaded, tmp_path / "out", [5])
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert found.eos_token_id == [1, 5, 7] and found.suppress_tokens == [9], "rows without a token stay unsaid"


def test_a_model_without_sdpa_falls_back_to_its_own_attention(monkeypatch) -> None:
    root = make_root("gemma2", torch.float32, probe=False)
    monkeypatch.setattr(type(root.lm), "_supports_sdpa", False)
    assert why_not_packed(root)
    assert root.lm.config._attn_implementation == "eager"


def test_attention_in_half_precision_on_a_cpu_is_computed_in_full(monkeypatch) -> None:
    """Where there are gradients and rows are short; torch's kernel is slower there, and less exact."""
    seen, plain = [], attention.F.scaled_dot_product_attention

    def watched(query, *others, **named):
        seen.append((query.dtype, torch.is_autocast_enabled("cpu")))
        return plain(query, *others, **named)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", watched)
    q, k, v = (torch.randn(1, 4, 9, 8, requires_grad=True) for _ in range(3))
    exact = attention._attend(q, k, v, 0, None, 0.0, None)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention._attend(q, k.bfloat16(), v.bfloat16(), 0, None, 0.0, None)
        with torch.no_grad():
            attention._attend(q, k, v, 0, None, 0.0, None)
    assert seen == [(torch.float32, False), (torch.float32, False), (torch.float32, True)]
    assert found.dtype == torch.bfloat16 and (found - exact).abs().max() < 0.03
