"""Samples during training: what the model makes of a few prompts, every so many steps, to be read while it learns.

    sample_steps: 200
    sample_prompts: ["The meaning of life is", "春眠不觉晓，"]

Each prompt is gone on with greedily (a dialogue's answer in `sft`), before the first step and after every `sample_steps`.
The lines are in `samples.jsonl` beside the log, and belong to the same steps when a run is taken up again. They change
nothing about the training.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import model_validator

from danlu.core.config import Config, free
from danlu.core.errors import DataError
from danlu.core.records import Message
from danlu.core.terminal import visible
from danlu.pipeline.context import Context

if TYPE_CHECKING:
    from danlu.train.parallel import World

SHOWN = 160  # characters of a sample that are printed; the file has all
Sampler = Callable[[Any, int], Sequence[Mapping[str, object]]]


class SampleConfig(Config):
    """The keys about samples during training."""

    sample_steps: int | None = free(None, ge=1, description="every how many steps sample_prompts are gone on with")
    sample_prompts: tuple[str, ...] = free((), description="texts (in sft: requests) that the model goes on from")
    sample_new_tokens: int = free(48, ge=1, description="longest sample, in tokens")

    @model_validator(mode="after")
    def _samples_are_asked_for(self) -> "SampleConfig":
        unread = [name for name in ("sample_prompts", "sample_new_tokens") if name in self.model_fields_set]
        if self.sample_steps is None and unread:
            raise ValueError(f"{unread[0]} is read with sample_steps only")
        if self.sample_steps is not None and not self.sample_prompts:
            raise ValueError("sample_steps needs sample_prompts, the texts that the model is to go on from")
        return self


def sampler_of(context: Context, tokenizer: Any, world: "World", *, chat: bool = False) -> Sampler | None:
    """What the Trainer asks after each step: lines for `samples.jsonl`, none where it is not time. None: no samples.

    `chat`: the prompts are requests under the chat template.
    """
    settings: SampleConfig = context.settings
    every = settings.sample_steps
    if every is None:
        return None
    if world.size > 1:
        context.console.print("sample_steps: no samples, for the weights are split over several processes", markup=False)
        return None

    def sample(root: Any, step: int) -> list[dict[str, object]]:
        if step % every:
            return []
        say = _answers if chat else continuations
        texts = say(root.lm, tokenizer, settings.sample_prompts, settings.sample_new_tokens)
        for prompt, text in zip(settings.sample_prompts, texts, strict=True):
            shown = " ".join(f"{prompt} ▸ {text}".split())
            context.console.print(visible(f"step {step}: {shown[:SHOWN]}{'…' if len(shown) > SHOWN else ''}"), markup=False,
                                  highlight=False, soft_wrap=True)
        return [{"step": step, "prompt": prompt, "sample": text}
                for prompt, text in zip(settings.sample_prompts, texts, strict=True)]

    return sample


def continuations(lm: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int,
                  keys: tuple[str, str] = ("sample_prompts", "sample_new_tokens")) -> list[str]:
    """The texts that the prompts are gone on with; each begins as a document does in training.

    Raises DataError where one is too long for the model; `keys` are the settings that it names.
    """
    from danlu.evals.perplexity import start_token
    from danlu.models.generate import generate, max_positions, stop_ids_of
    from danlu.tokens.codec import Codec, num_ids

    codec, first = Codec(tokenizer), start_token(tokenizer)
    begin = [] if first is None else [first]
    rows = [[*begin, *ids.tolist()] for ids in codec.encode_plain(list(prompts))]
    stops = {*stop_ids_of(lm), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}
    limit = max_positions(lm)
    for number, row in enumerate(rows):
        if limit is not None and len(row) + max_new_tokens > limit:
            raise DataError(f"{len(row)} tokens and {max_new_tokens} new ones are more than the {limit} "
                            "positions of the model",
                            where=f"{keys[0]}.{number}", hint=f"Shorten it, or lower {keys[1]}.")
    made = generate(lm, rows, max_new_tokens=max_new_tokens, stop_ids=stops, pad_id=0, num_ids=num_ids(tokenizer))
    return [codec.decode(completion.answer) for completion in made]


def _answers(lm: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """The answers to requests. Raises DataError where one cannot be asked."""
    from danlu.evals.generative import Answerer

    answerer = Answerer(lm, tokenizer, max_new_tokens=max_new_tokens)
    answers = answerer.answer([(Message("user", prompt),) for prompt in prompts])
    if answerer.unasked:
        raise DataError(f"the prompt leaves no room for {max_new_tokens} tokens, or the chat template refuses it",
                        where=f"sample_prompts.{min(answerer.unasked)}", hint="Shorten it, or lower sample_new_tokens.")
    return answers
