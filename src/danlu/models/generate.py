"""Generation with a key-value cache: batches for evaluation, one request at a time for chat.

Prompts are sorted by length, padded on the left and decoded together; padding is told by length, never by its id, and
is never attended. A row that has stopped leaves the batch at once. Every request draws from a generator of its own, so
its samples depend on its seed alone, not on its neighbours. Log-probabilities are the model's own (temperature 1,
nothing cut off), as a full forward pass would give them.

    completions = generate(model, prompts, max_new_tokens=64, stop_ids=[2], pad_id=0)
    for token in stream(model, prompt, max_new_tokens=256, stop_ids=[2], temperature=0.7, seed=1): …
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from danlu.core.errors import DataError
from danlu.models import attention


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model answered.

    tokens    with the stop token as the last one where there is one
    logprobs  natural logarithm of each token's probability under the unaltered model
    stopped   the model ended by itself; otherwise `max_new_tokens` ended it
    """

    tokens: list[int]
    logprobs: list[float]
    stopped: bool

    @property
    def answer(self) -> list[int]:
        """The tokens without the stop token."""
        return self.tokens[:-1] if self.stopped else self.tokens


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen: temperature 0 takes the most probable one; top_k 0 and top_p 1 cut nothing off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise DataError(f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p} cannot be meant",
                            hint="temperature ≥ 0, top_k ≥ 0 (0: all tokens), 0 < top_p ≤ 1.")


@contextmanager
def use_plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Switches from packed to transformers' own attention, and back at the end; other kinds are left alone."""
    packed = model.config._attn_implementation == attention.NAME
    if packed:
        attention.leave_packed(model)
    try:
        yield
    finally:
        if packed:
            model.set_attn_implementation(attention.NAME)


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
             seeds: int | Sequence[int] = 0, batch_size: int = 64) -> list[Completion]:
    """One completion per prompt, in the order of the prompts.

    `seeds` is one seed per request, or one seed from which each request's own is derived by its index. Raises DataError
    for an empty prompt and for one that, with `max_new_tokens`, is longer than the model's positions.
    """
    sampling = Sampling(temperature, top_k, top_p)
    _check_lengths(model, prompts, max_new_tokens)
    uniforms = _uniforms(seeds, len(prompts), max_new_tokens if temperature > 0 else 0)
    made: list[list[tuple[int, float, bool]]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda request: (len(prompts[request]), request))
    with evaluating(model), use_plain_attention(model):
        for start in range(0, len(order), batch_size):
            requests = order[start:start + batch_size]
            rows = _Rows.start(model, [prompts[request] for request in requests], pad_id)
            for step in _decode(rows, max_new_tokens, frozenset(stop_ids), sampling, uniforms[requests]):
                for row, token, logprob, stopped in step:
                    made[requests[row]].append((token, logprob, stopped))
    return [Completion([token for token, _, _ in steps], [logprob for _, logprob, _ in steps],
                       bool(steps) and steps[-1][2]) for steps in made]


def stream(model: PreTrainedModel, prompt: Sequence[int], *, max_new_tokens: int, stop_ids: Collection[int],
           temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> Iterator[int]:
    """The tokens of one completion as they are made, without the stop token.

    Closing the iterator ends the work and leaves the model as it was. The same seed gives the same tokens as
    `generate` with `seeds=[seed]`. Raises DataError as `generate` does.
    """
    sampling = Sampling(temperature, top_k, top_p)
    _check_lengths(model, [prompt], max_new_tokens)
    uniforms = _uniforms([seed], 1, max_new_tokens if temperature > 0 else 0)
    with evaluating(model), use_plain_attention(model):
        rows = _Rows.start(model, [prompt], pad_id=0)
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


@dataclass(slots=True)
class _Rows:
    """The rows of a batch that are still being decoded, and their cache."""

    model: PreTrainedModel
    mask_BT: torch.Tensor
    positions_B: torch.Tensor  # of the last token that was fed
    logits_BV: torch.Tensor
    cache: DynamicCache
    rows: list[int] = field(default_factory=list)  # which row of the first batch each remaining row is

    @classmethod
    @torch.no_grad()
    def start(cls, model: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_id: int) -> "_Rows":
        """Feeds the prompts, padded on the left to the longest."""
        width = max(len(prompt) for prompt in prompts)
        ids = np.full((len(prompts), width), pad_id, np.int64)
        lengths = np.array([len(prompt) for prompt in prompts])
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt):] = prompt
        device = next(model.parameters()).device
        columns = np.arange(width)[None] - (width - lengths)[:, None]
        mask_BT = torch.from_numpy((columns >= 0).astype(np.int64)).to(device)
        positions_BT = torch.from_numpy(np.maximum(columns, 0)).to(device)
        cache = DynamicCache(config=model.config)
        output = model(input_ids=torch.from_numpy(ids).to(device), attention_mask=mask_BT, position_ids=positions_BT,
                       past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cls(model, mask_BT, positions_BT[:, -1], output.logits[:, -1].float(), output.past_key_values,
                   list(range(len(prompts))))

    @torch.no_grad()
    def feed(self, tokens_B: torch.Tensor) -> None:
        """One more token for every row."""
        self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(self.mask_BT), 1)], dim=1)
        self.positions_B = self.positions_B + 1
        output = self.model(input_ids=tokens_B[:, None], attention_mask=self.mask_BT,
                            position_ids=self.positions_B[:, None], past_key_values=self.cache, use_cache=True,
                            logits_to_keep=1)
        self.logits_BV = output.logits[:, -1].float()

    def keep(self, kept: list[int]) -> None:
        """Drops every row but these; the cache is copied at each step anyway, so this costs no more than a step."""
        index = torch.tensor(kept, device=self.mask_BT.device)
        self.cache.batch_select_indices(index)
        self.mask_BT, self.positions_B = self.mask_BT[index], self.positions_B[index]
        self.rows = [self.rows[row] for row in kept]


Step = list[tuple[int, int, float, bool]]  # (row of the first batch, token, its log-probability, whether it stopped)


def _decode(rows: _Rows, max_new_tokens: int, stop_ids: frozenset[int], sampling: Sampling,
            uniforms: np.ndarray) -> Iterator[Step]:
    """Token by token, until every row has stopped or has all its tokens."""
    for count in range(max_new_tokens):
        drawn = uniforms[rows.rows, count] if sampling.temperature > 0 else None
        tokens_B = choose(rows.logits_BV, sampling, drawn)
        logprobs_B = torch.log_softmax(rows.logits_BV, dim=-1).gather(1, tokens_B[:, None])[:, 0]
        tokens = tokens_B.tolist()
        stopped = [token in stop_ids for token in tokens]
        yield list(zip(rows.rows, tokens, logprobs_B.tolist(), stopped, strict=True))
        kept = [row for row, ends in enumerate(stopped) if not ends]
        if not kept or count + 1 == max_new_tokens:
            return
        if len(kept) < len(tokens):
            rows.keep(kept)
            tokens_B = tokens_B[torch.tensor(kept, device=tokens_B.device)]
        rows.feed(tokens_B)


def choose(logits_BV: torch.Tensor, sampling: Sampling, drawn_B: np.ndarray | None) -> torch.Tensor:
    """The next token of each row, int64 [B]; `drawn_B` are uniform numbers in [0, 1), not needed at temperature 0.

    Sampling inverts the distribution function in the order of the vocabulary: rounding noise in the logits then moves
    a border a little instead of swapping two tokens.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    assert drawn_B is not None, "sampling needs one uniform number per row"
    scores_BV = logits_BV.double() / sampling.temperature
    if 0 < sampling.top_k < scores_BV.shape[1]:
        least_B1 = scores_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < least_B1, -torch.inf)
    probs_BV = torch.softmax(scores_BV, dim=-1)
    if sampling.top_p < 1:
        probs_BV = _nucleus(probs_BV, sampling.top_p)
    reached_BV = probs_BV.cumsum(dim=-1)
    aim_B1 = torch.as_tensor(drawn_B, device=reached_BV.device)[:, None] * reached_BV[:, -1:]
    return torch.searchsorted(reached_BV, aim_B1, right=True)[:, 0].clamp(max=reached_BV.shape[1] - 1)


def _nucleus(probs_BV: torch.Tensor, top_p: float) -> torch.Tensor:
    """The most probable tokens that together reach `top_p` (the one that reaches it included); the others are 0."""
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
    kept_BV = torch.zeros_like(probs_BV, dtype=torch.bool).scatter(1, order_BV, before_BV < top_p)
    return probs_BV.masked_fill(~kept_BV, 0.0)
