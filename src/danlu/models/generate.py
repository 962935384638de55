"""Generation with a key-value cache: batches for rollouts and evaluation, one request at a time for chat.

Prompts are sorted by length, padded on the left and decoded together; equal ones are fed once, and their cache is copied.
Padding is told by length, never by its id, and is never attended. A row that has stopped leaves the batch at once. Every
request draws from a generator of its own, so its samples depend on its seed alone, not on its neighbours; to the last bit
that holds for a constant batch. Log-probabilities are those of the distribution that was sampled from before any
cutting-off, as a full forward pass would give them (`sampling` says why).

    completions = generate(model, prompts, max_new_tokens=64, stop_ids=[2], pad_id=0)
    for token in stream(model, prompt, max_new_tokens=256, stop_ids=[2], temperature=0.7, seed=1): …

Legend: B rows, H heads, T positions, D head width, V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from danlu.core.errors import DataError
from danlu.models import attention
from danlu.models.sampling import Sampling, choose

ROOM = 64  # positions by which a full cache grows
WIDTH = 64  # the prompts of a constant batch are as wide as a multiple of this
ROWS = 4  # a constant batch has a multiple of this: a CPU's matrix kernels take so many at once, and a rest otherwise


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model answered.

    tokens    with the stop token as the last one where there is one
    logprobs  natural logarithm of each token's probability in softmax(logits / temperature) over the ids that exist, before
              top_k and top_p; temperature 0 counts as 1
    stopped   the model ended by itself; otherwise `max_new_tokens` ended it
    """

    tokens: list[int]
    logprobs: list[float]
    stopped: bool

    @property
    def answer(self) -> list[int]:
        """The tokens without the stop token."""
        return self.tokens[:-1] if self.stopped else self.tokens


@contextmanager
def use_plain_attention(model: PreTrainedModel, alike: bool = False) -> Iterator[None]:
    """Switches from packed to transformers' own attention, and back at the end; other kinds are left alone.

    alike  on a CPU the form of "sdpa" that knows no difference between a batch's rows
    """
    before = model.config._attn_implementation
    attention.leave_packed(model)
    if alike and model.config._attn_implementation == "sdpa" and model.device.type == "cpu":
        model.set_attn_implementation(attention.ALIKE)
    try:
        yield
    finally:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout); afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def max_positions(model: PreTrainedModel) -> int | None:
    """How many tokens a sequence may have at most, or None where the model states no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)  # not every architecture has one


def stop_ids_of(model: PreTrainedModel) -> list[int]:
    """The ids that end a turn as the checkpoint's generation config names them; empty where it names none."""
    config = model.generation_config
    found = config.eos_token_id if config is not None else None
    return [] if found is None else sorted(found) if isinstance(found, list) else [found]


def generate(model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
             stop_ids: Collection[int], pad_id: int, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
             num_ids: int | None = None, seeds: int | Sequence[int] = 0, batch_size: int = 64,
             constant_batch: bool = False) -> list[Completion]:
    """One completion per prompt, in the order of the prompts.

    num_ids         ids at or beyond it are neither sampled nor counted in the probabilities; None: the model's vocabulary
    seeds           one per request, or one from which each request's own is derived by its index
    constant_batch  the shape of nothing that goes through the model depends on a request's neighbours: a batch has always
                    `batch_size` rows, rounded up to a multiple of 4; rows that have stopped stay in it; prompts are padded
                    to a multiple of 64 tokens (or to the model's limit less `max_new_tokens`) and decoded with those of the
                    same width only. Then a request's tokens and log-probabilities are the same to the last bit whatever its
                    neighbours are; and wherever in the batch it stands, if the kernels treat all rows alike. (On a CPU
                    attention is made to; torch's activations do not at the end of a tensor or of a thread's part of it,
                    unless that is a multiple of 64 elements, as it is with the usual widths and numbers of threads.) Equal
                    prompts are not fed once, as that would make the shape depend on them.

    Raises DataError for an empty prompt, for one that, with `max_new_tokens`, is longer than the model's positions, and
    for a way of sampling that cannot be meant.
    """
    sampling = Sampling(temperature, top_k, top_p, num_ids)
    _check_lengths(model, prompts, max_new_tokens)
    uniforms = _uniforms(seeds, len(prompts), max_new_tokens if temperature > 0 else 0)
    limit = max_positions(model)
    if constant_batch:
        batch_size = -(-batch_size // ROWS) * ROWS
    made: list[list[tuple[int, float, bool]]] = [[] for _ in prompts]
    with evaluating(model), use_plain_attention(model, alike=constant_batch):
        for requests, width in _batches(prompts, batch_size, constant_batch, limit and limit - max_new_tokens):
            asked = [prompts[request] for request in requests]
            rows = (_Rows.start_constant(model, asked, pad_id, width, batch_size) if constant_batch
                    else _Rows.start(model, asked, pad_id, width))
            for step in _decode(rows, max_new_tokens, frozenset(stop_ids), sampling, uniforms[requests], constant_batch):
                for row, token, logprob, stopped in step:
                    made[requests[row]].append((token, logprob, stopped))
    return [Completion([token for token, _, _ in steps], [logprob for _, logprob, _ in steps],
                       bool(steps) and steps[-1][2]) for steps in made]


def stream(model: PreTrainedModel, prompt: Sequence[int], *, max_new_tokens: int, stop_ids: Collection[int],
           temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, num_ids: int | None = None, seed: int = 0
           ) -> Iterator[int]:
    """The tokens of one completion as they are made, without the stop token.

    Closing the iterator ends the work and leaves the model as it was. The same seed gives the same tokens as
    `generate` with `seeds=[seed]`. Raises DataError as `generate` does.
    """
    sampling = Sampling(temperature, top_k, top_p, num_ids)
    _check_lengths(model, [prompt], max_new_tokens)
    uniforms = _uniforms([seed], 1, max_new_tokens if temperature > 0 else 0)
    with evaluating(model), use_plain_attention(model):
        rows = _Rows.start(model, [prompt], 0, len(prompt))
        for [(_, token, _, stopped)] in _decode(rows, max_new_tokens, frozenset(stop_ids), sampling, uniforms):
            if stopped:
                return
            yield token


def _check_lengths(model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    limit = max_positions(model)
    for request, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise DataError("a prompt without tokens has nothing to go on from", where=f"prompt {request}")
        if limit is not None and len(prompt) + max_new_tokens > limit:
            raise DataError(f"{len(prompt)} prompt tokens and {max_new_tokens} new ones are more than the {limit} "
                            "positions of the model", where=f"prompt {request}",
                            hint="Shorten the prompt or lower max_new_tokens.")


def _uniforms(seeds: int | Sequence[int], num_requests: int, num_tokens: int) -> np.ndarray:
    """float64 [requests, tokens]: one draw per token, each row from a generator of its own."""
    keys = [[seeds, request] for request in range(num_requests)] if isinstance(seeds, int) else [[s] for s in seeds]
    assert len(keys) == num_requests, "one seed per request"
    return np.stack([np.random.default_rng(key).random(num_tokens) for key in keys]) if keys else np.empty((0, 0))


def _batches(prompts: Sequence[Sequence[int]], batch_size: int, constant: bool, widest: int | None
             ) -> Iterator[tuple[list[int], int]]:
    """Which requests are decoded together, and how wide their prompts are padded.

    Equal prompts follow each other, so that only the end of a batch can part them. In a constant batch all prompts have the
    same width, and either all or none of them are padded: without padding other kernels run, which need no mask.
    """
    def kind(request: int) -> tuple[int, bool]:
        length = len(prompts[request])
        width = -(-length // WIDTH) * WIDTH
        width = width if widest is None else min(width, widest)
        return (width, length < width) if constant else (0, False)

    order = sorted(range(len(prompts)), key=lambda request: (len(prompts[request]), tuple(prompts[request]), request))
    for (width, _), group in groupby(order, key=kind):
        alike = list(group)
        for start in range(0, len(alike), batch_size):
            requests = alike[start:start + batch_size]
            yield requests, width or len(prompts[requests[-1]])


class _RoomyLayer(DynamicLayer):
    """A layer's keys and values with room behind them: a token is written there, and what came before is not copied.

    keys and values are views [B, H, T, D] of what is filled.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes in the states [B, H, new, D] of new tokens and returns those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._stores = [key_states[:, :, :0], value_states[:, :, :0]]
        used = self.get_seq_length()
        self._stores = [_append(self._stores[0], used, key_states), _append(self._stores[1], used, value_states)]
        return self._show(used + key_states.shape[2])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes these rows, with their room."""
        used = self.get_seq_length()
        self._stores = [store.index_select(0, beam_idx) for store in self._stores]
        self._show(used)

    def _show(self, used: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self._stores[0][:, :, :used], self._stores[1][:, :, :used]
        return self.keys, self.values


def _append(store: Tensor, used: int, states: Tensor) -> Tensor:
    """`store` with `states` behind its first `used` positions; a larger copy of it where there is no room for them."""
    end = used + states.shape[2]
    if store.shape[2] < end:
        larger = states.new_empty(*states.shape[:2], end + ROOM, states.shape[3])
        larger[:, :, :used] = store[:, :, :used]
        store = larger
    store[:, :, used:end] = states
    return store


@dataclass(slots=True)
class _Rows:
    """The rows of a batch that are being decoded, and their cache."""

    model: PreTrainedModel
    mask_BT: Tensor | None  # None where no row is padded
    positions_B: Tensor  # of the last token that was fed
    logits_BV: Tensor
    cache: DynamicCache
    rows: list[int | None]  # which prompt each row goes on from; None: nobody waits for what comes of it

    @classmethod
    def start(cls, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int, width: int) -> "_Rows":
        """Feeds every prompt, equal ones once, padded on the left to `width`."""
        places: dict[tuple[int, ...], int] = {}
        index = [places.setdefault(tuple(prompt), len(places)) for prompt in prompts]
        fed = cls._fed(model, list(places), pad_id, width)
        if len(places) < len(prompts):
            fed.keep(index)
        fed.rows = list(range(len(prompts)))
        return fed

    @classmethod
    def start_constant(cls, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int, width: int,
                       batch_size: int) -> "_Rows":
        """Feeds `batch_size` rows of `width` tokens; the first prompt stands in for those that are missing."""
        missing = batch_size - len(prompts)
        fed = cls._fed(model, [*prompts, *[prompts[0]] * missing], pad_id, width)
        fed.rows = [*range(len(prompts)), *[None] * missing]
        return fed

    @classmethod
    @torch.no_grad()
    def _fed(cls, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int, width: int) -> "_Rows":
        ids = np.full((len(prompts), width), pad_id, np.int64)
        lengths = np.array([len(prompt) for prompt in prompts])
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt):] = prompt
        device = next(model.parameters()).device
        columns = np.arange(width)[None] - (width - lengths)[:, None]
        mask_BT = torch.from_numpy((columns >= 0).astype(np.int64)).to(device) if lengths.min() < width else None
        positions_BT = torch.from_numpy(np.maximum(columns, 0)).to(device)
        cache = DynamicCache(config=model.config)
        cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        output = model(input_ids=torch.from_numpy(ids).to(device), attention_mask=mask_BT, position_ids=positions_BT,
                       past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cls(model, mask_BT, positions_BT[:, -1], output.logits[:, -1].float(), output.past_key_values,
                   [None] * len(prompts))

    @torch.no_grad()
    def feed(self, tokens_B: Tensor) -> None:
        """One more token for every row."""
        if self.mask_BT is not None:
            self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(self.mask_BT), 1)], dim=1)
        self.positions_B = self.positions_B + 1
        output = self.model(input_ids=tokens_B[:, None], attention_mask=self.mask_BT,
                            position_ids=self.positions_B[:, None], past_key_values=self.cache, use_cache=True,
                            logits_to_keep=1)
        self.logits_BV = output.logits[:, -1].float()

    def keep(self, places: list[int]) -> None:
        """Takes these rows, each as often as it is named; this copies their cache once."""
        index = torch.tensor(places, device=self.logits_BV.device)
        # batch_select_indices would do the same, but not for layers that keep a state
        self.cache.reorder_cache(index)  # type: ignore[arg-type]  # a LongTensor is a Tensor of int64
        self.mask_BT = None if self.mask_BT is None else self.mask_BT[index]
        self.positions_B, self.logits_BV = self.positions_B[index], self.logits_BV[index]
        self.rows = [self.rows[place] for place in places]


Step = list[tuple[int, int, float, bool]]  # (number of the prompt, token, its log-probability, whether it stopped)


def _decode(rows: _Rows, max_new_tokens: int, stop_ids: frozenset[int], sampling: Sampling, uniforms: np.ndarray,
            constant_batch: bool = False) -> Iterator[Step]:
    """Token by token, until every row has stopped or has all its tokens."""
    for count in range(max_new_tokens):
        drawn_B = uniforms[[row or 0 for row in rows.rows], count] if sampling.temperature > 0 else None
        tokens_B, logprobs_B = choose(rows.logits_BV, sampling, drawn_B)
        tokens, logprobs = tokens_B.tolist(), logprobs_B.tolist()
        yield [(row, token, logprob, token in stop_ids)
               for row, token, logprob in zip(rows.rows, tokens, logprobs, strict=True) if row is not None]
        going = [row is not None and token not in stop_ids for row, token in zip(rows.rows, tokens, strict=True)]
        if not any(going) or count + 1 == max_new_tokens:
            return
        if constant_batch:
            rows.rows = [row if goes else None for row, goes in zip(rows.rows, going, strict=True)]
        elif not all(going):
            rows.keep([place for place, goes in enumerate(going) if goes])
            tokens_B = tokens_B[torch.tensor(going, device=tokens_B.device)]
        rows.feed(tokens_B)
