"""The rendering is transformers' rendering, and the spans are what the assistant says with its end of turn."""

import time
import tracemalloc
from datetime import datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from danlu.core.errors import ConfigError, DataError
from danlu.core.records import Message
from danlu.tokens.chat import Chat
from danlu.tokens.encode import weights_from_spans
from danlu.tokens.template import TEMPLATE_ERRORS, Template
from tokens.samples import BRACKETS, CHATML, GOOD, NO_END, THINKING, make_tokenizer, make_words, talk

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
    ("end_at_last", ["Enough.</s>"]),  # the first answer has no end there: it is learned in a row of its own
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
    rendered = Chat(make_tokenizer(folder, THINKING, "<|im_end|>")).render(talk("a", "b"))
    assert not rendered.rewritten
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["<think>\n\n</think>\n\nb<|im_end|>"]


@pytest.mark.parametrize("first", ["b", "<think>\nhm\n</think>\n\nb"])
def test_of_a_history_that_the_template_rewrites_only_the_last_answer_is_learned(folder, first):
    rendered = Chat(make_tokenizer(folder, THINKING, "<|im_end|>")).render(talk("a", first, "c", "d"))
    assert rendered.rewritten
    assert "<|im_start|>assistant\nb<|im_end|>" in rendered.text
    assert [rendered.text[start:end] for start, end in rendered.spans] == ["<think>\n\n</think>\n\nd<|im_end|>"]


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


HOSTILE = [
    "{% set r = range(2000) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
    "{% set r = range(9999) %}{% for a in r %}{% for b in r if false %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    *("{{ 'x'.NAME(50000000) }}".replace("NAME", name) for name in ("ljust", "rjust", "center", "zfill")),
    "{{ ('x' | safe).ljust(50000000) }}",
    "{{ 'x' | center(50000000) }}",
    "{{ 'x' | indent(50000000, true) }}",
    "{{ '%60000000d' % 1 }}",
    "{{ '%.60000000f' % 1 }}",
    "{{ '%*d' % (60000000, 1) }}",
    "{{ '%60000000d' | format(1) }}",
    "{{ '{:60000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=60000000) }}",
    "{{ '{a:60000000}'.format_map({'a': 1}) }}",
    "{{ (1).to_bytes(50000000) }}",
    "{{ ('\\t' * 100000).expandtabs(100000) }}",
    "{{ ('x' * 100000).translate({120: 'x' * 100000}) }}",
    "{{ ('x' * 100000).replace('x', 'x' * 100000) }}",
    "{{ ('x' * 100000) | replace('', 'x' * 100000) }}",
    "{{ ('x' * 100000).join(range(10000) | map('string')) }}",
    "{{ range(10000) | map('string') | join('x' * 100000) }}",
    "{{ range(10000) | map('center', 9999) | list }}",
    "{{ [1] | batch(1000000000, 2) | list }}",
    "{{ [1] | slice(1000000000) | list }}",
    "{{ 1 | round(100000000, 'ceil') }}",
    "{{ ([1] * 10000) | tojson(separators=('x' * 100000, 'y')) }}",
    "{{ ([[1] * 1000] * 100) | sum(start=[]) }}",
    "{% set ns = namespace(n=7) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    *("{% set ns = namespace(s='xxxx') %}{% for i in range(60) %}{% set ns.s = TWICE %}{% endfor %}"
      .replace("TWICE", double) for double in ("ns.s + ns.s", "ns.s ~ ns.s", "[ns.s, ns.s]", "{'a': ns.s, 'b': ns.s}",
                                               "'%s%s' % (ns.s, ns.s)", "'{0}{0}'.format(ns.s)")),
    "{% set ns = namespace(s='xxxx') %}{% for i in range(60) %}{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
    "{% set s = 'x' * 400000 %}{% for i in range(9999) %}{% set t = s[1:] %}{% endfor %}",
    "{% set s %}{% for a in range(9999) %}{% for b in range(9999) %}" + "x" * 2000 + "{% endfor %}{% endfor %}{% endset %}",
]


@pytest.mark.parametrize("body", HOSTILE)
def test_a_hostile_template_takes_little_time_and_memory(monkeypatch, body):
    monkeypatch.setattr("danlu.tokens.template.MAX_SECONDS", 0.5)
    monkeypatch.setattr("danlu.tokens.template.MAX_MADE", 3_000_000)
    template = Template(body, "hostile", {})
    tracemalloc.start()
    started = time.process_time()  # a busy machine is not the template's work
    try:
        with pytest.raises(TEMPLATE_ERRORS, match=r"it (works|makes|asks|calls|writes)"):
            template.render([{"role": "user", "content": "hi"}])
        assert time.process_time() - started < 3  # one step may be under way when the time is over
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


def test_ordinary_templates_may_do_ordinary_things(folder):
    """Every kind of expression that the sandbox pays for gives what it gives in transformers."""
    template = (
        "{%- set ns = namespace(text='', seen=[], n=0) -%}{% macro show(x) %}<{{ x }}>{% endmacro %}"
        "{%- for m in messages[::-1] if m.role != 'system' -%}{% set ns.n = ns.n + 1 %}"
        "{%- set ns.text = ns.text + m.content ~ '|' ~ loop.index ~ none -%}{% set ns.seen = ns.seen + [m.role, 1.5] %}"
        "{{- show(m.content) }}{{ loop.length }}{{ loop.last }}{{ loop.previtem is defined }}"
        "{%- set block %}{{ m.content | upper }}!{% endset -%}{{ block }}{{ (m.role, block) }}"
        "{%- else %}nobody{% endfor -%}{% for k, v in {'a': [1], 'b': ns.seen}.items() %}{{ k }}{{ v }}{% endfor %}"
        "{%- for a in [[1, [2]], [3]] recursive %}{% if a is iterable %}({{ loop(a) }}){% else %}{{ a }}{% endif %}"
        "{%- endfor %}{{ ns.text }}{{ ns.text[1:3] }}{{ 'ab'.ljust(5, '.') }}"
        "{{- 'a-b'.replace('-', '+') }}{{ ', '.join(ns.seen[::2]) }}"
        "{{- '%05.1f|%s|%(x)s' % {'x': 2} if false else '%05.1f|%-4s|' % (2.25, 'é') }}{{ '{:>4}{x!r}'.format(7, x='q') }}"
        "{{- messages | map(attribute='role') | join('+') }}{{ ns.seen | tojson(indent=2) }}{{ 7 % 4 }}{{ 2 ** 5 }}"
        "{{- ('a<b' | e) + '<' }}{{ 'x' * 3 }}{{ [1, 2] * 2 }}{{ 'a\nb' | indent(2) }}{{ messages | length }}"
        "{{- messages | selectattr('role', 'equalto', 'user') | list | length }}{{ dict(a=1, self=2, context=3) }}"
        "{%- filter upper %}low{% endfilter %}{{ {'x': 'ü'} | tojson(separators=(',', ':')) }}{{ loop is defined }}\n")
    tokenizer = make_tokenizer(folder, template)
    own = Template(template, "ordinary", tokenizer.special_tokens_map)
    for messages in [*DIALOGUES, (Message("system", "a"),)]:
        assert own.render(as_dicts(messages)) == tokenizer.apply_chat_template(as_dicts(messages), tokenize=False)


def test_a_long_dialogue_may_be_collected_in_a_variable(folder):
    template = "{% set ns = namespace(s='') %}{% for m in messages %}{% set ns.s = ns.s + m.content %}{% endfor %}" \
               "{{ ns.s }}"
    messages = [{"role": "user", "content": "x" * 10_000}] * 200
    assert len(Template(template, "collector", {}).render(messages)) == 2_000_000


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


WORDS = ("{{ '<s>' }}{% for m in messages %}{{ (' 50 ' if m['role'] == 'user' else ' 51 ') + m['content'] + ' </s>' }}"
         "{% endfor %}{% if add_generation_prompt %}{{ ' 51' }}{% endif %}")


def test_a_special_token_is_refused_where_it_cannot_be_kept_as_text():
    chat = Chat(make_words(WORDS))
    assert not chat.codec.can_cut
    assert chat.prompt_ids(talk("7 8")) == [1, 50, 7, 8, 2, 51]
    with pytest.raises(DataError, match="spells a special token"):
        chat.prompt(talk("7 </s> 8"))
    with pytest.raises(DataError, match="spells a special token"):
        chat.encode([chat.render(talk("7 </s> 8", "9"))])


def test_a_special_token_is_refused_where_its_place_is_unknown(folder):
    """What a user says twice cannot be marked, so it cannot be kept apart either."""
    doubled = CHATML.replace("message['content']", "message['content'] + message['content'][:0 if message['role'] == "
                                                   "'assistant' else 20]")
    chat = Chat(make_tokenizer(folder, doubled, "<|im_end|>"))
    assert chat.prompt_ids(talk("hi"))
    with pytest.raises(DataError, match="spells a special token"):
        chat.prompt_ids(talk("hi <|im_end|>"))


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


# Roles, unfinished answers, and what is kept as text -----------------------------------------------------------------


def test_roles_ignore_case(chats):
    chat = chats["chatml"][1]
    shouted = tuple(Message(role, message.content) for role, message in zip(("System", "USER", " Assistant"),
                                                                            talk("a", "b", system="s")))
    assert chat.render(shouted) == chat.render(talk("a", "b", system="s"))


@pytest.mark.parametrize("name", ["chatml", "headers", "tools", "ours", "no_prompt"])
def test_an_unfinished_answer_is_gone_on_from(chats, name):
    chat = chats[name][1]
    asked = chat.prompt(talk("Hi?")).text
    begun = chat.prompt(talk("Hi?", "The answer is"))
    assert begun.text == asked + "The answer is"
    assert chat.codec.decode(chat.prompt_ids(talk("Hi?", "The answer is"))) == begun.text
    assert chat.prompt(talk("Hi?", " \n")).text == asked  # nothing was begun
    more = chat.prompt(talk("Hi?", "Hello.", "More?", "So")).text
    assert more == chat.prompt(talk("Hi?", "Hello.", "More?")).text + "So"


def test_white_space_at_the_end_of_an_unfinished_answer_stays_where_the_template_keeps_it(chats):
    assert chats["chatml"][1].prompt(talk("Hi?", "It is ")).text.endswith("assistant\nIt is ")
    assert chats["headers"][1].prompt(talk("Hi?", "It is ")).text.endswith("It is")  # it strips what is said
    assert chats["brackets"][1].prompt(talk("Hi?", "It is")).text.endswith("[/INST] It is")


def test_an_unfinished_answer_that_spells_a_special_token_stays_text(chats):
    tokenizer, chat = chats["chatml"]
    ids = chat.prompt_ids(talk("Hi?", "say <|im_end|> and"))
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
    assert chat.codec.decode(ids).endswith("assistant\nsay <|im_end|> and")


def test_an_unfinished_thought_is_gone_on_from(folder):
    template = CHATML.replace("+ message['content'] +", "+ ('<think>' + message['reasoning_content'] + '</think>' if "
                                                        "message['reasoning_content'] else '') + message['content'] +")
    chat = Chat(make_tokenizer(folder, template, "<|im_end|>"))
    begun = chat.prompt((Message("user", "a"), Message("assistant", "", thinking="First,")))
    assert begun.text.endswith("<|im_start|>assistant\n<think>First,")
    done = chat.prompt((Message("user", "a"), Message("assistant", "So", thinking="First,")))
    assert done.text.endswith("<think>First,</think>So")


def test_the_ids_of_a_prompt_are_those_of_the_row_where_history_is_rewritten(folder):
    chat = Chat(make_tokenizer(folder, THINKING, "<|im_end|>"))
    messages = talk("a", "<think>\nhm\n</think>\n\nb", "c", "<think>\nso\n</think>\n\nd")
    row = chat.encode([chat.render(messages)])[0]
    prompt = chat.prompt_ids(messages[:3])
    assert row.ids[:len(prompt)].tolist() == prompt


def test_an_answer_that_does_not_go_on_from_its_prompt_is_refused(folder):
    """A model would be asked behind <think>, and trained without it."""
    template = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>'")
    chat = Chat(make_tokenizer(folder, template, "<|im_end|>"))
    with pytest.raises(DataError, match="does not go on from the prompt"):
        chat.render(talk("a", "b"))
    assert chat.render(talk("a", "<think>so</think>b")).spans
