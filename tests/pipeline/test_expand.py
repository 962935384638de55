"""The stage `expand`: from a recipe to a model that transformers opens, with everything it says counted again here."""

import io
import json
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from small_runs import changed
from tokenizers import Tokenizer, models, pre_tokenizers
from tokens.growing import ENGLISH, byte_level
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from danlu.core.errors import ConfigError, DataError
from danlu.core.examples import Branch, Example
from danlu.core.records import Document
from danlu.models.load import load_model
from danlu.pipeline.plan import plan
from danlu.pipeline.recipe import Recipe
from danlu.pipeline.run import run
from danlu.pipeline.upkeep import read_ledger
from danlu.pipeline.vocabulary import Change, change_notes
from danlu.text.corpus import read_corpus
from danlu.tokens.codec import Codec
from danlu.tokens.expand import grow

DIRTY = ['{"piece": "你好"}', '{"piece": "人工智能"}', '{"piece": "你好"}', '{"piece": ""}', '{"piece": null}',
         '{"word": "x"}', '"a"', "not json", "", '{"piece": " 你"}', '{"piece": "a\\nb"}', '{"piece": "q"}',
         '{"piece": "你\\u200b好"}', '{"piece": "ＡＢ"}', '{"piece": "▁好"}']
RECIPE = """
name: growing
seed: 3
steps:
  corpus:
    stage: corpus
    sources: [{path: zh.txt, category: zh, document: line}, {path: en.txt, category: en, document: line}]
    clean: {min_chars: 10}
    heldout_share: 0.3
  grown:
    stage: expand
    model: old
    pieces: pieces.jsonl
    dataset: corpus
    pad_to_multiple_of: 64
  rows:
    stage: pt
    model: grown
    dataset: corpus
    finetuning_type: freeze
    freeze_trainable_layers: 0
    train_rows_from: grown
    cutoff_len: 32
    max_steps: 2
    learning_rate: 1.0e-2
    plot_loss: false
  all:
    stage: pt
    model: rows
    dataset: corpus
    cutoff_len: 32
    max_steps: 2
    plot_loss: false
"""


def make_model(folder: Path, dtype: torch.dtype = torch.float32, tied: bool = True) -> Path:
    """A tiny Llama with GPT-2's kind of tokenizer: 332 ids, 352 rows, and a config that names a row beyond the ids."""
    tokenizer = AutoTokenizer.from_pretrained(byte_level(folder))
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=352, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                         max_position_embeddings=64, eos_token_id=[tokenizer.eos_token_id, 300], tie_word_embeddings=tied,
                         pad_token_id=339, initializer_range=0.2)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("growing")
    make_model(folder / "old")
    chinese = [f"第{n}天，他说你好，人工智能{'很' * (n % 3 + 1)}好。人工智能是什么？" for n in range(24)]
    (folder / "zh.txt").write_text("\n".join(chinese), encoding="utf-8")
    (folder / "en.txt").write_text("\n".join(f"{n} {ENGLISH[n % 3]}" for n in range(24)), encoding="utf-8")
    (folder / "pieces.jsonl").write_text("\n".join(DIRTY), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(changed(RECIPE), console=Console(quiet=True))
    return folder


@pytest.fixture(autouse=True)
def here(home, monkeypatch):
    monkeypatch.chdir(home)


def grown(step: str = "grown") -> Path:
    folder = Path("runs/growing", step)
    return folder / (folder / "current").read_text().strip()


def go(name: str, **settings: object) -> dict:
    """Runs `expand` alone under another name, with other settings."""
    values = yaml.safe_load(RECIPE)
    step = {"stage": "expand", "model": "old", **settings}
    recipe = {"name": name, "steps": {"corpus": values["steps"]["corpus"], "grown": step}}
    return run(Recipe.from_text(yaml.safe_dump(recipe, allow_unicode=True), base=Path.cwd()), console=Console(quiet=True))


def test_what_transformers_opens():
    tokenizer, lm = AutoTokenizer.from_pretrained(grown()), AutoModelForCausalLM.from_pretrained(grown())
    old = AutoModelForCausalLM.from_pretrained("old")
    assert lm.config.vocab_size == 384 == len(lm.get_input_embeddings().weight)
    assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    assert torch.equal(lm.get_input_embeddings().weight[:340], old.get_input_embeddings().weight[:340])
    assert lm.config.eos_token_id == old.config.eos_token_id and lm.generation_config.eos_token_id == [300, 330]
    ids = tokenizer("人工智能")["input_ids"]
    assert len(ids) == 1 and ids[0] >= 340
    before = AutoTokenizer.from_pretrained("old")("人工智能")["input_ids"]
    expected = old.get_input_embeddings().weight[before].mean(0)
    torch.testing.assert_close(lm.get_input_embeddings().weight[ids[0]], expected)
    text = tokenizer(ENGLISH[0], return_tensors="pt")
    torch.testing.assert_close(lm(**text).logits[..., :332], old(**text).logits[..., :332], atol=1e-5, rtol=1e-5)


def test_the_config_names_the_first_new_row_as_long_as_the_model_lives():
    old, start = AutoModelForCausalLM.from_pretrained("old"), AutoModelForCausalLM.from_pretrained(grown())
    rows, after = (AutoModelForCausalLM.from_pretrained(grown(step)) for step in ("rows", "all"))
    assert "first_new_id" not in old.config.to_dict()
    assert [lm.config.to_dict()["first_new_id"] for lm in (start, rows, after)] == [340] * 3
    table, moved = start.get_input_embeddings().weight, rows.get_input_embeddings().weight
    assert torch.equal(moved[:340], table[:340]) and not torch.equal(moved[340:], table[340:])
    forecast = plan(changed(RECIPE)).steps["rows"].forecast
    assert any("of them trained" in note for note in forecast.notes)
    one = plan(changed(RECIPE, rows__train_rows_from=340)).steps["rows"].forecast
    assert (one.flops, one.memory) == (forecast.flops, forecast.memory)


def test_a_vocabulary_that_never_grew_has_no_such_rows():
    with pytest.raises(ConfigError, match=r"“train_rows_from”|train_rows_from is “grown”, but the vocabulary"):
        plan(changed(RECIPE, rows__model="old"))


def test_rows_without_token_are_not_generated():
    lm, growth = AutoModelForCausalLM.from_pretrained(grown()), json.loads((grown() / "growth.json").read_text())
    assert lm.generation_config.suppress_tokens == list(range(growth["num_ids"], 384))
    with torch.no_grad():
        lm.get_input_embeddings().weight[growth["num_ids"]:] = 100.0
    found = lm.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=20, do_sample=True, temperature=5.0)
    assert int(found.max()) < growth["num_ids"]


def test_rows_without_token_are_not_counted():
    loaded, num_ids = load_model(grown()), json.loads((grown() / "growth.json").read_text())["num_ids"]
    ids = loaded.tokenizer(ENGLISH[0])["input_ids"]
    lm = AutoModelForCausalLM.from_pretrained(grown())
    expected = lm(input_ids=torch.tensor([ids])).logits[0, :-1, :num_ids].log_softmax(-1)
    with torch.no_grad():
        loaded.lm.get_input_embeddings().weight[num_ids:] = 100.0
        read = loaded.root(loaded.root.batch([Example(ids[:1], (Branch(ids[1:]),))])).logprobs_S
    torch.testing.assert_close(read, expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0], atol=1e-4, rtol=1e-4)


def test_every_piece_is_in_the_ledger():
    kept = read_ledger(grown())
    stations = {station["name"]: station for station in kept.stations["stations"]}
    read, pieces, vocabulary = stations["read:pieces.jsonl"], stations["pieces"], stations["vocabulary"]
    assert read["in"]["rows"] == len(DIRTY)
    assert {reason for reason, count in read["dropped"].items() if count["rows"]} == {
        "no “piece”", "“piece” is not a text but nothing", "not an object but a string", "bad JSON", "blank line"}
    assert {reason: count["rows"] for reason, count in pieces["dropped"].items()} == {
        "repeated": 1, "empty": 1, "a blank at an end": 1, "holds a line end": 1, "already in the vocabulary": 1,
        "holds a zero-width character": 1, "full-width letters or digits": 1}
    assert pieces["out"]["rows"] == 3
    growth = json.loads((grown() / "growth.json").read_text())
    assert vocabulary["out"]["rows"] == len(growth["tokens"]) == growth["num_ids"] - growth["first_new_id"]
    assert any(places == ["pieces.jsonl:3"] for reason, (_, places) in kept.quarantine.items() if reason == "repeated")


def test_numbers_are_those_of_a_count_by_hand():
    metrics = json.loads((grown() / "manifest.json").read_text())["metrics"]
    growth = json.loads((grown() / "growth.json").read_text())
    assert metrics["first_new_id"] == growth["first_new_id"] == 340  # behind the row that the config names
    assert (metrics["num_ids_before"], metrics["rows_before"], metrics["rows"]) == (332, 352, 384)
    assert metrics["parameters"] - metrics["parameters_before"] == 32 * 16
    assert metrics["logits_difference"] < 1e-5 and metrics["logits_tokens"] > 20
    old, new = AutoTokenizer.from_pretrained("old"), AutoTokenizer.from_pretrained(grown())
    held_out = list(read_corpus(grown("corpus"), "heldout"))
    for category in ("zh", "en"):
        texts = [document.text for document in held_out if document.category == category]
        found = metrics["categories"][category]
        before, after = ([len(each(text)["input_ids"]) for text in texts] for each in (old, new))
        assert (found["texts"], found["characters"]) == (len(texts), sum(map(len, texts)))
        assert (found["tokens_before"], found["tokens_after"]) == (sum(before), sum(after))
        assert found["per_1000_after"] == round(1000 * sum(after) / sum(map(len, texts)), 2)
        assert found["texts_unchanged"] == (len(texts) if category == "en" else 0)
        assert found["texts_recut"] == 0
    assert metrics["categories"]["en"]["tokens_joined"] == 0 and growth["used"]["en"] == {}
    assert growth["recut"] == {} == dict.fromkeys(metrics["most_recut"])
    joined = {token["id"]: len(token["parts"]) for token in growth["tokens"]}
    ids = [id for document in held_out for id in new(document.text)["input_ids"] if id in joined]
    assert metrics["categories"]["zh"]["tokens_joined"] == sum(joined[id] for id in ids)
    assert sum(growth["used"]["zh"].values()) == len(ids)
    assert set(metrics["most_used"]["zh"][:2]) == {"人工智能", "你好"} and metrics["unreached"] == 0


def test_text_that_a_unigram_model_cuts_in_another_way_is_named():
    old = Tokenizer(models.Unigram([("<unk>", 0.0), *((piece, -5.0) for piece in ("\u2581", "x", "y", "z", "w", "xy")),
                                    ("yz", -5.05)], unk_id=0))
    old.pre_tokenizer = pre_tokenizers.Metaspace()
    growth = grow(old, ["yzw", "wx"], 8)
    before, after = (Codec(PreTrainedTokenizerFast(tokenizer_object=each)) for each in (old, growth.backend))
    change = Change(before, after, growth)
    assert [old.encode("xyzw").tokens, growth.backend.encode("xyzw").tokens] == [
        ["\u2581", "xy", "z", "w"], ["\u2581", "x", "yzw"]]
    for text in ("z xyzw xyzw", "wx yzw"):
        change.read(Document(text, "s", text, category="c"))
    found = change.summary()["categories"]["c"]
    assert (found["texts_recut"], found["tokens_recut"]) == (1, 6), "xy z w, twice"
    assert change.recut_pieces() == {"yzw": 6} and change.used_pieces() == {"c": {"yzw": 3, "wx": 1}}
    metrics = {**change.summary(), "most_recut": ["yzw"], "unreached": 2}
    assert change_notes(metrics) == [
        "1 texts are cut in another way, 6 old tokens of theirs, at “yzw” (all of them and how many tokens each: "
        "growth.json, recut)", "2 pieces do not come back when they are read alone (growth.json, unreached)"]
    metrics["categories"]["c"]["texts_recut"] = metrics["unreached"] = 0
    assert change_notes(metrics) == []


def test_new_rows_first_then_all():
    first, rows, every = (AutoModelForCausalLM.from_pretrained(grown(step)).state_dict()
                          for step in ("grown", "rows", "all"))
    table = "model.embed_tokens.weight"
    assert torch.equal(first[table][:340], rows[table][:340])
    assert not torch.equal(first[table][340:345], rows[table][340:345])
    assert all(torch.equal(first[name], rows[name]) for name in first if name not in (table, "lm_head.weight"))
    assert not torch.equal(rows[table][:340], every[table][:340])


def test_the_table_is_shown_made_and_reused():
    console = Console(file=io.StringIO(), width=140)
    run(changed(RECIPE), only=["grown"], console=console)
    said = console.file.getvalue()
    assert "reused" in said and "category zh" in said and "language en" in said and "embedding rows" in said
    assert "384" in said and "old logits on" in said


def test_the_plan_knows_the_size():
    planned = plan(changed(RECIPE, grown__num_pieces=3)).steps
    assert planned["grown"].forecast.facts["vocab_size"] == 384
    assert any("new tokens begin at id 340" in note for note in planned["grown"].forecast.notes)
    assert planned["rows"].forecast.facts["config"].vocab_size == 384


def test_the_same_bytes_twice(tmp_path):
    found = []
    for runs in ("a", "b"):
        artifact = run(changed(RECIPE, grown__init="random"), tmp_path / runs, only=["corpus", "grown"],
                       console=Console(quiet=True))["grown"]
        found.append(artifact.manifest["files"])
    assert found[0] == found[1]


@pytest.mark.parametrize("tied", [True, False])
def test_learned_pieces_and_half_precision(tmp_path, tied):
    make_model(tmp_path / "half", torch.bfloat16, tied)
    artifact = go(f"learned-{tied}", model=str(tmp_path / "half"), dataset="corpus", num_pieces=6, min_count=5,
                  learn_categories=["zh"], init="norm_matched")["grown"]
    assert artifact.metrics["pieces"] == 6 and artifact.metrics["categories"]["en"]["texts_unchanged"] > 0
    lm = AutoModelForCausalLM.from_pretrained(artifact.folder)
    old = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert lm.dtype == torch.bfloat16 and lm.config.vocab_size == 352  # six new tokens fit into rows that no token had
    for table in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(old, table)().weight, getattr(lm, table)().weight
        assert torch.equal(before[:340], after[:340])
        assert not torch.equal(before[340:346], after[340:346])
    learn = next(station for station in read_ledger(artifact.folder).stations["stations"] if station["name"] == "learn")
    assert learn["dropped"]["another category"]["rows"] > 5


def test_a_replaced_vocabulary():
    Path("both.jsonl").write_text("\n".join(json.dumps({"piece": x}) for x in ("你好", "人工智能", "▁the", "fox")))
    artifact = go("replaced", pieces="both.jsonl", mode="replace")["grown"]
    tokenizer, lm = AutoTokenizer.from_pretrained(artifact.folder), AutoModelForCausalLM.from_pretrained(artifact.folder)
    assert lm.config.vocab_size == len(tokenizer) == artifact.metrics["num_ids"] < 290
    named = tokenizer.convert_tokens_to_ids(AutoTokenizer.from_pretrained("old").convert_ids_to_tokens(300))
    assert lm.generation_config.eos_token_id == sorted([named, tokenizer.eos_token_id]) and named != 300
    assert lm.config.eos_token_id == [tokenizer.eos_token_id, named]
    assert lm.config.pad_token_id is None and artifact.metrics["logits_difference"] is None
    old = AutoModelForCausalLM.from_pretrained("old").get_input_embeddings().weight
    new = lm.get_input_embeddings().weight
    assert torch.equal(new[tokenizer.eos_token_id], old[330])
    text = "你好 the fox 😀"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_vocabulary_that_is_replaced_learns_its_commonest_words_again():
    artifact = go("learned-anew", dataset="corpus", mode="replace", num_pieces=40, min_count=3, learn_ascii=True)["grown"]
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in ("old", artifact.folder))
    again = {token for token in set(old.get_vocab()) & set(new.get_vocab()) if len(token) > 3 and not token.startswith("<")}
    assert len(again) >= 3, "words that the old vocabulary had"
    assert len(new(ENGLISH[0])["input_ids"]) < 0.75 * len(ENGLISH[0])


def test_text_beyond_the_limit_is_not_learned_from():
    artifact = go("limited", dataset="corpus", num_pieces=3, min_count=2, max_bytes_per_category=200)["grown"]
    learn = next(station for station in read_ledger(artifact.folder).stations["stations"] if station["name"] == "learn")
    assert 390 < learn["out"]["bytes"] <= 400, "of each of both categories the first 200 bytes, whole characters"
    assert learn["dropped"]["beyond max_bytes_per_category"]["bytes"] == learn["in"]["bytes"] - learn["out"]["bytes"]


def test_a_tokenizer_that_its_model_type_opens_otherwise(tmp_path):
    """transformers goes by `model_type` for some families, and by `tokenizer_class` where no config lies beside."""
    folder = make_model(tmp_path / "mixed")
    shape, known = LlamaConfig.from_pretrained(folder).to_dict(), Qwen2Config().to_dict()
    config = Qwen2Config(**{key: value for key, value in shape.items() if key in known} | {"model_type": "qwen2"})
    Qwen2ForCausalLM(config).save_pretrained(folder)
    values = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**values, "tokenizer_class": "LlamaTokenizerFast"}))
    artifact = go("mixed", model=str(folder), pieces="pieces.jsonl")["grown"]
    old, new = (AutoTokenizer.from_pretrained(place) for place in (folder, artifact.folder))
    assert type(old) is type(new) and new(ENGLISH[0])["input_ids"] == old(ENGLISH[0])["input_ids"]
    assert len(new("人工智能")["input_ids"]) == 1 < len(old("人工智能")["input_ids"])


@pytest.mark.parametrize("settings,message", [
    ({}, "neither a file of pieces nor a dataset"), ({"dataset": "corpus"}, "num_pieces is missing"),
    ({"pieces": "pieces.jsonl", "min_count": 3}, "min_count is about learning"),
    ({"pieces": "pieces.jsonl", "init": "zeros"}, "init"),
    ({"pieces": "none.jsonl"}, "neither an earlier step nor a file")])
def test_settings_that_cannot_be_meant(settings, message):
    with pytest.raises(ConfigError, match=message):
        go("wrong", **settings)


def test_nothing_new_and_kinds_that_cannot_grow(tmp_path):
    Path("old.jsonl").write_text('{"piece": "q"}')
    with pytest.raises(DataError, match=r"no piece is new: .*\n  1 refused: already in the vocabulary"):
        go("nothing", pieces="old.jsonl")
    folder = make_model(tmp_path / "words")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"] = {"type": "WordLevel", "vocab": {"a": 0, "<|endoftext|>": 1, "<|pad|>": 2}, "unk_token": "a"}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ConfigError, match="WordLevel"):
        go("words", model=str(folder), pieces="pieces.jsonl")
    folder = make_model(tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    for model_type, made_for in (("t5", "T5ForConditionalGeneration"), ("bert", "BertForMaskedLM")):
        (folder / "config.json").write_text(json.dumps({
            "model_type": model_type, "architectures": [made_for], "vocab_size": config["vocab_size"]}))
        with pytest.raises(ConfigError, match=f"{made_for} is no causal language model"):
            go("words", model=str(folder), pieces="pieces.jsonl")


def test_a_category_that_no_document_has():
    with pytest.raises(DataError, match=r"no document is of the category “fr”.*\n.*The data hold: en, zh"):
        go("lost", dataset="corpus", num_pieces=5, min_count=2, learn_categories=["zh", "fr"])
