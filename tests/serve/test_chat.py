"""The chat: text that appears whole, commands, a window that slides, answers that can be stopped."""

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny_chat import POSITIONS, make_folder, tiny_loaded

from danlu.core.errors import ConfigError, DanluError, DataError
from danlu.core.terminal import visible
from danlu.models import generate as generate_module
from danlu.serve.chat import Conversation, Session, TextStream, chat
from danlu.tokens.chat import Chat


def session(output: io.StringIO, **changed: object) -> Session:
    loaded = tiny_loaded()
    settings: dict = {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 12, "system": None, "seed": 0} | changed
    return Session(loaded.lm, loaded.tokenizer, Console(file=output, width=200), **settings)


@given(st.text(alphabet=st.sampled_from("春眠不觉晓😀é a1\n👩‍🚀ß"), max_size=20))
def test_characters_are_shown_whole_and_at_once(text: str) -> None:
    tokenizer = tiny_loaded().tokenizer
    streamed = TextStream(tokenizer)
    pieces = [streamed.push(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(pieces) == text, "nothing is left for the end"
    assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 270), max_size=40))
def test_any_tokens_come_out_as_their_decoding(tokens: list[int]) -> None:
    tokenizer = tiny_loaded().tokenizer
    streamed = TextStream(tokenizer)
    text = "".join(streamed.push(token) for token in tokens) + streamed.finish()
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    # bytes that are no text at all may be given out in more or fewer replacement signs, everything else is the same
    assert text.replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_broken_bytes_do_not_hold_the_text_forever() -> None:
    tokenizer = tiny_loaded().tokenizer
    [lead, *_] = tokenizer.encode("😀", add_special_tokens=False)
    streamed = TextStream(tokenizer)
    assert any(streamed.push(lead) for _ in range(20))


def test_control_characters_cannot_steer_the_terminal() -> None:
    output = io.StringIO()
    talk = session(output)
    talk.show("a\x1b[2Jb\x07\u009b1m\u202e c\n春")
    assert output.getvalue() == "a␛[2Jb␇\ufffd1m\ufffd c\n春"
    talk.say("/\u202e")
    talk.note("no room for \x1b[2J")
    assert "\x1b" not in output.getvalue()


def test_answers_are_streamed_and_remembered() -> None:
    output = io.StringIO()
    talk = session(output)
    assert talk.say("hello") and talk.say("   ")
    [question, answer] = talk.conversation.turns
    assert (question.role, question.content, answer.role) == ("user", "hello", "assistant")
    assert output.getvalue() == visible(answer.content) + "\n"
    prompt = talk.template.prompt_ids([question])
    [whole] = generate_module.generate(tiny_loaded().lm, [prompt], max_new_tokens=12, stop_ids=talk.template.stop_ids,
                                       pad_id=0)
    assert answer.content.replace("\ufffd", "") == tiny_loaded().tokenizer.decode(
        whole.answer, skip_special_tokens=True).replace("\ufffd", "")


def test_sampling_follows_the_seed() -> None:
    def said(seed: int) -> list[str]:
        talk = session(io.StringIO(), temperature=1.0, seed=seed)
        talk.say("one")
        talk.conversation.clear()
        talk.say("one")
        return [talk.conversation.turns[1].content, str(talk.num_answers)]

    assert said(1) == said(1) != said(5)


def test_commands() -> None:
    output = io.StringIO()
    talk = session(output)
    talk.say("hello")
    assert talk.say("/clear") and talk.conversation.turns == []
    assert talk.say("/help") and "/exit" in output.getvalue()
    assert talk.say("/quit") and "There is no command /quit" in output.getvalue()
    assert talk.conversation.turns == [], "a mistyped command is no message"
    assert not talk.say(" /exit ")


def test_the_oldest_messages_go_when_the_window_is_full() -> None:
    loaded = tiny_loaded()
    talk = Conversation(Chat(loaded.tokenizer), 60, 20, system="be brief")
    sizes = []
    dropped = 0
    for number in range(8):
        prompt, gone = talk.ask(f"question {number}")
        sizes.append(len(prompt))
        dropped += gone
        talk.answered("fine")
        assert len(talk.turns) + dropped == 2 * (number + 1)
        assert talk.turns[0].role == "user" and talk.turns[-2].content == f"question {number}"
        text = loaded.tokenizer.decode(prompt)
        assert "be brief" in text, "the system message stays"
    assert dropped > 0 and max(sizes) + 20 <= 60
    before = list(talk.turns)
    with pytest.raises(DanluError, match="there is room for 40"):
        talk.ask("字" * 50)
    assert talk.turns == before
    talk.clear()
    assert talk.turns == [] and talk.system


def test_the_window_is_told_in_the_chat() -> None:
    output = io.StringIO()
    talk = session(output)
    for _ in range(6):
        talk.say("hello there, what is new?")
    assert "no longer fit" in output.getvalue()
    talk.say("字" * POSITIONS)
    assert "there is room for" in output.getvalue()
    assert len(talk.conversation.turns) % 2 == 0


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []

    def interrupted(*_: object, **__: object) -> Iterator[int]:
        try:
            yield from tiny_loaded().tokenizer.encode("half an answer", add_special_tokens=False)
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    output = io.StringIO()
    talk = session(output)
    with monkeypatch.context() as patch:
        patch.setattr(generate_module, "stream", interrupted)
        assert talk.say("hello")
    assert output.getvalue() == "half an answer …\n" and closed == [True]
    assert talk.conversation.turns[-1].content == "half an answer"
    assert talk.say("again") and len(talk.conversation.turns) == 4


def test_lines_from_a_pipe(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model")
    code = ("import sys; from rich.console import Console; from danlu.serve.chat import chat; "
            f"chat({str(folder)!r}, Console(file=sys.stdout), temperature=0.0, max_new_tokens=5, system='be')")
    done = subprocess.run([sys.executable, "-c", code], input="你好\n/clear\nhi \udcff\n/exit\nnever\n".encode(
        errors="surrogateescape"), capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert "Forgotten." in done.stdout.decode() and "›" not in done.stdout.decode()


@pytest.mark.parametrize("chosen", [{"top_p": 0.0}, {"top_p": 1.5}, {"temperature": -1.0}])
def test_sampling_that_cannot_be_meant_is_refused_before_loading(tmp_path: Path, chosen: dict) -> None:
    with pytest.raises(DataError, match="cannot be meant"):
        chat(tmp_path / "nothing", Console(file=io.StringIO()), **chosen)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        chat(tmp_path, Console(file=io.StringIO()))
