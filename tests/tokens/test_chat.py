"""The rendering is transformers' rendering, and the spans are what the assistant says with its end of turn."""

from datetime import datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danlu.core.errors import ConfigError, DataError
from danlu.core.records import Message
from danlu.tokens.chat import Chat
from danlu.tokens.encode import weights_from_spans
from tokens.samples import BRACKETS, CHATML, GOOD, NO_END, THINKING, make_tokenizer, talk

DIALOGUES = [talk("Hi?", "Hello."), talk("Hi?", "Hello.", "More?", "Enough 你好 🙂."),
             talk("  a \n", " b\n", "c\t", "d "), talk("Hi?", "Hello.", system="Be kind."),
             talk("Hi?", "Hello.", "And?")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def chats(folder):
    made = {name: make_tokenizer(folder, template, eos, "<|bos|>" if name == "ours" else "<s>")
            for name, (template, eos) in GOOD.items()}
    return {name: (tokenizer, Chat(tokenizer)) for name, tokenizer in made.items()}


def as_dicts(messages):
    return [{"role": message.role, "content": message.content} for message in messages]


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("generation", [False, True])
def test_same_text_as_transformers(chats, name, generation):
    tokenizer, chat = chats[name]
    for messages in DIALOGUES:
        expected = tokenizer.apply_chat_template(as_dicts(messages), tokenize=False, add_generation_prompt=generation)
        assert chat.render(messages, add_generation_prompt=generation).text == expected


def test_same_text_for_filters_clock_and_loop_controls(folder):
    template = ("{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m | tojson }}"
                "{{ {'b': '<é>', 'a': 1} | tojson(indent=2) }}{% if loop.index > 2 %}{% break %}{% endif %}"
                "{% endfor %}\n{{ strftime_now('%Y-%m') }}{{ documents is none }}{{ unk_token is defined }}\n")
    tokenizer = make_tokenizer(folder, template)
    chat = Chat(tokenizer, now=datetime.now)
    for messages in DIALOGUES:
        assert chat.render(messages, True).text == tokenizer.apply_chat_template(as_dicts(messages), tokenize=False,
                                                                                 add_generation_prompt=True)


def test_the_date_is_fixed_so_that_equal_input_gives_equal_text(folder):
    chat = Chat(make_tokenizer(folder, "{{ strftime_now('%d %b %Y') }}" + CHATML, "<|im_end|>"))
    assert chat.render(talk("a", "b")).text.startswith("26 Jul 2024<|im_start|>")


@pytest.mark.parametrize(("name", "expected"), [
    ("chatml", ["Hello.<|im_end|>", "Enough.<|im_end|>"]),
    ("default_system", ["Hello.<|im_end|>", "Enough.<|im_end|>"]),
    ("headers", ["Hello.<|eot_id|>", "Enough.<|eot_id|>"]),
    ("tools", ["Hello.<|im_end|>", "Enough.<|im_end|>"]),
    ("brackets", [" Hello. </s>", " Enough. </s>"]),  # the prompt ends with [/INST]: the space is the model's
    ("end_at_last", ["Hello.", "Enough.</s>"]),
    ("no_prompt", ["Hello.<|im_end|>", "Enough.<|im_end|>"]),
    ("ours", ["Hello.<|end|>", "Enough.<|end|>"]),
])
def test_spans(chats, name, expected):
    rendered = chats[name][1].render(talk("Hi?", "Hello.", "More?", "Enough.", system="Be kind."))
    assert [rendered.text[start:end] for start, end in rendered.spans] == expected


def test_answers_equal_to_template_text_are_found_in_their_place(chats):
    rendered = chats["chatml"][1].render(talk("assistant", "assistant", "system\n", "user"))
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["assistant<|im_end|>", "user<|im_end|>"]
    assert rendered.spans[0][0] > rendered.text.index("<|im_start|>assistant\n")


def test_what_the_template_writes_after_the_prompt_is_learned(folder):
    rendered = Chat(make_tokenizer(folder, THINKING, "<|im_end|>")).render(talk("a", "b", "c", "d"))
    assert [rendered.text[start:end] for start, end in rendered.spans] == [
        "b<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"]


def test_a_template_that_rewrites_history_is_refused_by_name(folder):
    chat = Chat(make_tokenizer(folder, THINKING, "<|im_end|>", name="thinker"))
    with pytest.raises(ConfigError, match=r"(?s)“thinker”.*assistant spans cannot be found.*rewrites"):
        chat.render(talk("a", "<think>\nhm\n</think>\n\nb", "c", "d"))


def test_a_template_that_looks_at_what_users_say_is_understood(folder):
    short = "('SHORT ' if message['role'] == 'user' and message['content'] | length < 4 else '')"
    chat = Chat(make_tokenizer(folder, CHATML.replace("message['content']", f"{short} + message['content']"),
                               "<|im_end|>"))
    rendered = chat.render(talk("a", "bcdef", "and much longer", "b"))
    assert "SHORT a" in rendered.text
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["bcdef<|im_end|>", "b<|im_end|>"]


def test_a_template_without_end_of_turn_is_refused_with_the_reason(folder):
    chat = Chat(make_tokenizer(folder, NO_END, name="endless"))
    with pytest.raises(ConfigError, match=r"(?s)“endless”.*the end of a turn would never be learned"):
        chat.render(talk("a", "b"))


def test_a_tokenizer_without_template_is_refused_with_advice(folder):
    with pytest.raises(ConfigError, match=r"(?s)no chat template.*chat_template\.jinja"):
        Chat(make_tokenizer(folder, None))


def test_an_end_of_turn_that_is_not_eos_is_found_and_stops_generation(folder):
    chat = Chat(make_tokenizer(folder, CHATML, eos="</s>"))
    rendered = chat.render(talk("a", "b"))
    assert rendered.text[slice(*rendered.spans[0])] == "b<|im_end|>"
    assert chat.codec.special.token_to_id("<|im_end|>") in chat.stop_ids
    assert chat.codec.special.token_to_id("</s>") in chat.stop_ids


def test_named_templates_use_the_default(folder):
    tokenizer = make_tokenizer(folder, None, "<|im_end|>")
    tokenizer.chat_template = {"default": CHATML, "tool_use": NO_END}
    assert Chat(tokenizer).render(talk("a", "b")).text.startswith("<|im_start|>user\na")


def test_a_refusal_of_the_template_is_about_the_data(folder):
    chat = Chat(make_tokenizer(folder, BRACKETS, "</s>"))
    with pytest.raises(DataError, match="roles must alternate"):
        chat.render((Message("user", "a"), Message("user", "b"), Message("assistant", "c")))


@pytest.mark.parametrize("body", [
    "{% for i in range(10000000) %}x{% endfor %}",
    "{{ 'x' * 100000000 }}",
    "{{ 2 ** 100000 }}",
    "{% for a in range(9999) %}{% for b in range(9999) %}{{ 'xxxxxxxxxx' }}{% endfor %}{% endfor %}",
    "{{ messages.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
])
def test_a_hostile_template_is_stopped(folder, body):
    chat = Chat(make_tokenizer(folder, body))
    with pytest.raises(DataError, match="refuses this dialogue"):
        chat.render(talk("a", "b"))


def test_a_template_that_works_forever_is_stopped(folder, monkeypatch):
    monkeypatch.setattr("danlu.tokens.template.MAX_SECONDS", 0.2)
    body = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match="works for more than"):
        Chat(make_tokenizer(folder, body)).render(talk("a", "b"))


def test_invalid_jinja_is_refused_with_its_line(folder):
    with pytest.raises(ConfigError, match="line 2"):
        Chat(make_tokenizer(folder, "a\n{% for %}"))


def test_a_special_token_spelled_by_a_user_stays_text(chats):
    tokenizer, chat = chats["chatml"]
    messages = talk("say <|im_end|> please", "ok <|im_start|>")
    row = chat.encode([chat.render(messages)])[0]
    assert chat.codec.decode(row.ids) == chat.render(messages).text
    ids = row.ids.tolist()
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    prompt = chat.prompt_ids(messages[:1])
    assert ids[:len(prompt)] == prompt


def test_no_bos_but_the_templates(chats):
    tokenizer, chat = chats["headers"]
    ids = chat.prompt_ids(talk("Hi?"))
    assert ids.count(tokenizer.bos_token_id) == 1
    assert chats["chatml"][1].prompt_ids(talk("Hi?")).count(tokenizer.bos_token_id) == 0


def test_a_template_without_generation_prompt_gets_the_header(chats):
    assert chats["no_prompt"][1].prompt(talk("Hi?")).text.endswith("<|im_end|>\n<|im_start|>assistant\n")


CONTENTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
    st.lists(st.sampled_from(["a", "B", " ", "\n", "\t", "1", "(", "你", "🙂", "é", "'s", "<|im_end|>", "</s>", ": ",
                              "assistant", "\r\n", "zqxj"]), min_size=1, max_size=8).map("".join),
).filter(str.strip)


@pytest.mark.parametrize("name", GOOD)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(contents=st.lists(CONTENTS, min_size=2, max_size=6).map(lambda x: x[:len(x) // 2 * 2]),
       system=st.none() | CONTENTS)
def test_learned_tokens_are_the_spans_and_the_prompt_is_a_prefix(chats, name, contents, system):
    tokenizer, chat = chats[name]
    messages = talk(*contents, system=system)
    rendered = chat.render(messages)
    assert rendered.text == tokenizer.apply_chat_template(as_dicts(messages), tokenize=False)
    row = chat.encode([rendered])[0]
    assert chat.codec.decode(row.ids) == rendered.text
    weights = weights_from_spans(row.offsets, rendered.spans)
    learned = chat.codec.decode(row.ids[weights > 0])
    spans = "".join(rendered.text[start:end] for start, end in rendered.spans)
    if name == "end_at_last":  # a middle turn has no end token, so its last token may hold the line end after it
        assert learned.replace("\n", "") == spans.replace("\n", "")
    else:
        assert learned == spans
    for k, message in enumerate(messages):
        if message.role == "assistant" and name != "end_at_last":
            prompt = chat.prompt_ids(messages[:k])
            assert row.ids[:len(prompt)].tolist() == prompt
