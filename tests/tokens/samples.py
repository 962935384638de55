"""Small tokenizers made on the fly, and chat templates in the styles of the families."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from danlu.core.examples import Example
from danlu.core.records import Dialogue, Message
from danlu.tokens.encode import Encoder
from danlu.tokens.train import CHAT_TEMPLATE, train_bpe

CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

DEFAULT_SYSTEM = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}\
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

HEADERS = """\
{% set loop_messages = messages %}
{% for message in loop_messages %}
    {% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + \
'<|eot_id|>' %}
    {% if loop.index0 == 0 %}
        {% set content = bos_token + content %}
    {% endif %}
    {{- content }}
{% endfor %}
{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\n' }}{{- tools | tojson }}{{- '<|im_end|>\n' }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "system" and loop.first %}{% continue %}{%- endif %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content }}{%- endgeneration %}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

BRACKETS = """\
{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}\
{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}\
{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}\
{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}\
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% else %}\
{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

END_AT_LAST = """\
{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\
{% if loop.last and message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}assistant: {% endif %}"""

NO_PROMPT = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}\
{% endfor %}"""

THINKING = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' and '</think>' in message.content and not loop.last %}
        {{- message.content.split('</think>')[-1].lstrip('\n') }}
    {%- elif message.role == 'assistant' and loop.last and '</think>' not in message.content %}
        {{- '<think>\n\n</think>\n\n' + message.content }}
    {%- else %}
        {{- message.content }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""

NO_END = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"

# The templates that can be trained with, and the end-of-sequence token that their tokenizers declare.
GOOD = {"chatml": (CHATML, "<|im_end|>"), "default_system": (DEFAULT_SYSTEM, "<|im_end|>"),
        "headers": (HEADERS, "<|eot_id|>"), "tools": (TOOLS, "<|im_end|>"), "brackets": (BRACKETS, "</s>"),
        "end_at_last": (END_AT_LAST, "</s>"), "no_prompt": (NO_PROMPT, "<|im_end|>"),
        "ours": (CHAT_TEMPLATE, "<|end|>")}

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEXT = ("What is the capital of France? The answer is Paris. Give three tips for staying healthy and say why. "
        "今天天气如何?今天是晴天,我们去公园散步。 def add(a, b):\n    return a + b\n\nassistant: user: system: ") * 4


@cache
def backend_json(folder: str) -> str:
    """The serialised byte-level BPE that all template tests share; `folder` is where its files are put."""
    return train_bpe([TEXT], 420, Path(folder), SPECIAL).to_str()


def make_tokenizer(folder: str, template: str | None, eos: str = "<|end|>", bos: str | None = "<s>",
                   name: str = "sample") -> PreTrainedTokenizerFast:
    """A transformers fast tokenizer with that template."""
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(backend_json(folder)), eos_token=eos,
                                   bos_token=bos, pad_token="<|pad|>")
    made.chat_template = template
    made.name_or_path = name
    return made


FAMILIES = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
            "<start_of_turn>", "<end_of_turn>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<reserved_106>",
            "<reserved_107>", "[gMASK]", "sop", "<sop>", "<|end|>"]
# What families declare as the end of a text where it is not </s>.
ENDS = {"deepseek3": "<｜end▁of▁sentence｜>", "deepseek_r1": "<｜end▁of▁sentence｜>"}


def make_family(folder: str, name: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer without a chat template that has the special tokens of all families."""
    path = Path(folder) / "families"
    if not path.exists():
        train_bpe([TEXT], 450, path, FAMILIES)
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(str(path / "tokenizer.json")), bos_token="<s>",
                                   eos_token=ENDS.get(name, "</s>"), pad_token="<|pad|>")
    made.name_or_path = "family"
    return made


def make_words(template: str | None = None, bos: str | None = "<s>") -> PreTrainedTokenizerFast:
    """A tokenizer whose words are numbers and whose ids are these numbers; <s> is 1 and </s> is 2."""
    vocab = {"[UNK]": 0, "<s>": 1, "</s>": 2} | {str(i): i for i in range(3, 400)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken("<s>", normalized=False), AddedToken("</s>", normalized=False)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token=bos)
    made.chat_template = template
    return made


def talk(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    """User and assistant in turn."""
    turns = [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    return tuple(([Message("system", system)] if system is not None else []) + turns)


def dialogue(*contents: str, system: str | None = None, id: str = "f:1") -> Dialogue:
    """A Dialogue whose messages take turns, the user first."""
    return Dialogue(talk(*contents, system=system), "f", id)


def learned_text(encoder: Encoder, examples: Iterable[Example]) -> list[str]:
    """What is learned of each example, as text."""
    return [encoder.codec.decode(x.branches[0].tokens[x.branches[0].weights > 0]) for x in examples]
