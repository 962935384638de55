"""A model's own mistakes as rejected answers."""

from dataclasses import replace

from tiny_chat import tiny_loaded

from danlu.core.records import Preference, Prompt
from danlu.rollout import preferences
from danlu.rollout.preferences import SAMPLED, sampled_preferences
from danlu.tasks import TASKS, task_preferences


def records(count: int = 12) -> list[Preference]:
    return task_preferences("copy", 3, count)


def test_wrong_answers_of_the_model_take_the_place_of_the_rejected_ones(monkeypatch) -> None:
    monkeypatch.setattr(preferences, "AT_ONCE", 5)
    found = list(sampled_preferences(tiny_loaded(), TASKS["copy"], records(), 1, 60))
    again = list(sampled_preferences(tiny_loaded(), TASKS["copy"], records(), 1, 60))
    other = list(sampled_preferences(tiny_loaded(), TASKS["copy"], records(), 2, 60))
    assert found == again != other and len(found) == 12
    changed = [(before, after) for before, after in zip(records(), found) if after.category == SAMPLED]
    assert changed, "random weights are wrong, and some of their answers end"
    for before, after in changed:
        assert after.chosen == before.chosen and after.rejected not in (before.rejected, "")
        prompt = Prompt(after.messages, after.chosen, after.source, after.id)
        assert TASKS["copy"].score(prompt, after.rejected) == 0
    assert all(before == after for before, after in zip(records(), found) if after.category != SAMPLED)


def test_what_is_asked_together_changes_no_answer(monkeypatch) -> None:
    whole = list(sampled_preferences(tiny_loaded(), TASKS["copy"], records(), 1, 60))
    monkeypatch.setattr(preferences, "AT_ONCE", 3)
    assert list(sampled_preferences(tiny_loaded(), TASKS["copy"], records(), 1, 60)) == whole


def test_a_right_answer_stays_what_it_is(monkeypatch) -> None:
    class Lenient:
        """Finds every answer right."""

        name = "lenient"

        def score(self, prompt: Prompt, completion: str) -> float:
            return 1.0

    assert list(sampled_preferences(tiny_loaded(), Lenient(), records(), 1, 60)) == records()


def test_a_prompt_without_room_is_not_asked() -> None:
    long = replace(records()[0], messages=(replace(records()[0].messages[0], content="so long " * 200),))
    assert list(sampled_preferences(tiny_loaded(), TASKS["copy"], [long], 1, 60)) == [long]
