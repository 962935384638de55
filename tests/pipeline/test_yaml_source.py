"""YAML with places."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.core.errors import ConfigError
from danlu.pipeline.yaml_source import read_source


def refused(text):
    with pytest.raises(ConfigError) as caught:
        read_source(text, "r.yaml")
    return str(caught.value)


def test_values_and_places():
    source = read_source("a: 1e-4\nb:\n  - x\n  - {c: ~, d: true}\ne: 2020-01-01\nf: 'on'\ng: yes\n", "r.yaml")
    assert source.values == {"a": 1e-4, "b": ["x", {"c": None, "d": True}], "e": "2020-01-01", "f": "on", "g": "yes"}
    assert type(source.values["a"]) is float
    assert source.place(("b", 1, "d")) == "r.yaml:4"
    assert source.place(("b", 1, "nothing", "below")) == "r.yaml:4"
    assert source.place(("nothing",)) == "r.yaml:1"


def test_keys_given_twice():
    assert refused("a: 1\nb: 2\na: 3\n") == "r.yaml:3: the key “a” is given twice (first at r.yaml:1)"


@pytest.mark.parametrize(("text", "message"), [
    ("a: [1,\n", "r.yaml:2: is not valid YAML: expected the node content, but found '<stream end>'"),
    ("a: *nowhere\n", "r.yaml:1: is not valid YAML: found undefined alias 'nowhere'"),
    ("a: 1\n---\nb: 2\n", "r.yaml:2: is not valid YAML: but found another document"),
    ("a: .inf\n", "r.yaml:1: '.inf' is not a finite number"),
    ("\n? [1]\n: 2\n", "r.yaml:2: a key must be a word"),
    ("a: &x {b: 1}\nc:\n  <<: *x\n", "r.yaml:3: merge keys (<<) are not read; write the keys out"),
    ("a: !!python/name:os.system x\n",
     "r.yaml:1: the tag of 'x' is not read: values are plain text, numbers, lists, mappings"),
    ("a: !mine 3\n", "r.yaml:1: the tag of '3' is not read: values are plain text, numbers, lists, mappings"),
])
def test_what_is_refused(text, message):
    assert refused(text) == message


def test_aliases_that_multiply_are_refused():
    bomb = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    assert "too many" in refused(bomb)
    assert "too many or too deeply" in refused("a: &a [*a]\n")
    assert "deeply" in refused("a: " + "[" * 3000 + "]" * 3000)


def test_an_alias_may_be_used():
    assert read_source("a: &x [1]\nb: *x\n", "r").values == {"a": [1], "b": [1]}


def test_override():
    source = read_source("steps:\n  base: {stage: pt, sizes: [1, 2]}\n", "r.yaml")
    source.override("steps.base.learning_rate=1e-3")
    source.override("steps.base.sizes.1={a: [b]}")
    assert source.values["steps"]["base"] == {"stage": "pt", "sizes": [1, {"a": ["b"]}], "learning_rate": 1e-3}
    assert source.place(("steps", "base", "learning_rate")) == "--set steps.base.learning_rate=1e-3"
    assert source.place(("steps", "base", "sizes", 1, "a")) == "--set steps.base.sizes.1={a: [b]}"
    assert source.place(("steps", "base", "stage")) == "r.yaml:2"


@pytest.mark.parametrize(("option", "message"), [
    ("seed", "--set seed: is not of the form path=value"),
    ("=3", "--set =3: is not of the form path=value"),
    ("steps.bse.x=1", "--set steps.bse.x=1: there is no “steps.bse”\n  Did you mean base?"),
    ("steps.base.sizes.7=1", "--set steps.base.sizes.7=1: “steps.base.sizes” is a list of 2; “7” is no index into it"),
    ("steps.base.stage.x=1", "--set steps.base.stage.x=1: “steps.base.stage” is the value 'pt'; there is nothing"),
    ("seed=[1", "--set seed=[1: is not valid YAML"),
])
def test_override_errors(option, message):
    source = read_source("steps:\n  base: {stage: pt, sizes: [1, 2]}\n", "r.yaml")
    with pytest.raises(ConfigError) as caught:
        source.override(option)
    assert str(caught.value).startswith(message)


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text):
    try:
        read_source(text, "r.yaml")
    except ConfigError as error:
        assert str(error).startswith("r.yaml")
