"""The root module: the one way to call a model. Its forward runs trunk, sites and head on a Batch.

Everything that is differentiated happens inside one module's forward, because FSDP2 gathers a root's parameters there
and nowhere else. The trunk is any transformers causal language model's base model; the head is `models/head.py`.

    reading = root(batch, coefficients_S=objective.coefficients(batch))     # training: reading.total carries the graph
    reading = root(batch)                                                   # scoring: reading.logprobs_S
    reading = ScoreRoot(lm)(batch)                                          # a reward model: reading.scores_N
    reading = ClassRoot(lm)(batch)                                          # a classifier: reading.logits_NK
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from danlu.core.errors import ConfigError
from danlu.data.batch import Batch
from danlu.models import head
from danlu.models.adapters import unwrapped
from danlu.models.attention import leave_packed
from danlu.models.generate import evaluating
from danlu.models.neftune import EmbeddingNoise


@dataclass(frozen=True, slots=True, eq=False)
class SiteReading:
    """What was read at the sites of a batch.

    total       scalar Σ c·logp, differentiable; None unless coefficients were given
    logprobs_S  log p of each target, nats; differentiable unless coefficients were given
    entropy_S, argmax_S, log_squares_S  on request, detached; the last is log Σ_v p_v²
    """

    logprobs_S: Tensor
    total: Tensor | None = None
    entropy_S: Tensor | None = None
    argmax_S: Tensor | None = None
    log_squares_S: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ScoreReading:
    """What a scalar head read.

    scores_N  one number per branch, at its last token
    values_S  one number per site, at the token before the target: the value of the state in which it was chosen
    """

    scores_N: Tensor
    values_S: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ClassReading:
    """What a head of K classes read: K logits per branch, at its last token."""

    logits_NK: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ActorCriticReading:
    """What a policy and its critic read at the sites, both differentiable."""

    logprobs_S: Tensor
    values_S: Tensor


class Trunk(nn.Module):
    """A transformers model whose hidden states are read. `packs` says whether batches come packed or padded."""

    def __init__(self, lm: PreTrainedModel, packs: bool = True) -> None:
        super().__init__()
        self.lm = lm
        self.packs = packs
        self.autocast: torch.dtype | None = None  # the precision of the arithmetic, where it is not that of the weights
        self.noise: EmbeddingNoise | None = None  # on the embeddings while training

    def batch(self, examples: list) -> Batch:
        """The examples in the form that this model takes."""
        return Batch.pack(examples) if self.packs else Batch.pad(examples)

    def hidden(self, batch: Batch) -> Tensor:
        """The trunk's last hidden states, [B·T, D]."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids_BT, "use_cache": False}
        if batch.layout is not None:
            inputs |= {"position_ids": batch.position_ids_BT, "layout": batch.layout}
        else:
            inputs |= {"attention_mask": batch.attention_mask_BT}
        if batch.token_type_ids_BT is not None and vars(self.lm.config).get("type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = batch.token_type_ids_BT
        noise = nullcontext() if self.noise is None else self.noise.reading(batch)
        with noise, torch.autocast(batch.input_ids_BT.device.type, self.autocast, enabled=self.autocast is not None):
            return self.lm.base_model(**inputs).last_hidden_state.flatten(0, 1)


class Root(Trunk):
    """A causal language model with its head read at sites only.

    num_ids  ids from here on do not exist and count in no probability (a vocabulary may be padded beyond its tokenizer)
    """

    def __init__(self, lm: PreTrainedModel, *, packs: bool = True) -> None:
        super().__init__(lm, packs)
        self.shape = head_shape(lm)
        self.num_ids: int | None = None
        self.statistics = False  # whether every reading without coefficients brings its statistics along
        self._workspace = head.Workspace()

    def forward(self, batch: Batch, coefficients_S: Tensor | None = None, statistics: bool = False) -> SiteReading:
        """Reads the batch's sites. `coefficients_S` asks for Σ c·logp in one pass, `statistics` for entropy and arg max."""
        site_SD = self.before_head(self.hidden(batch).index_select(0, batch.site_index_S))
        if self.autocast is not None:
            site_SD = site_SD.to(self.autocast)  # the head's products too; its softmax and sums stay in float32
        weight_VD, bias_V = self.projection()
        if self.num_ids is not None and self.num_ids < len(weight_VD):
            weight_VD, bias_V = weight_VD[:self.num_ids], None if bias_V is None else bias_V[:self.num_ids]
        options: dict[str, Any] = {"bias_V": bias_V, "shape": self.shape, "workspace": self._workspace}
        if coefficients_S is None:
            found = head.logprobs(site_SD, weight_VD, batch.site_target_S, statistics=statistics or self.statistics,
                                  **options)
            return SiteReading(found.logprobs_S, None, found.entropy_S, found.argmax_S, found.log_squares_S)
        total, logprobs_S = head.weighted_sum(site_SD, weight_VD, batch.site_target_S, coefficients_S, **options)
        return SiteReading(logprobs_S, total)

    def before_head(self, site_SD: Tensor) -> Tensor:
        """What is done to the sites' hidden states before the projection: nothing in a causal model."""
        return site_SD

    def projection(self) -> tuple[Tensor, Tensor | None]:
        """The head's weight [V, D] and bias [V]."""
        return projection(self.lm)


class ScoreRoot(Trunk):
    """A causal trunk with a head of one number: a reward model, or a critic."""

    def __init__(self, lm: PreTrainedModel, *, packs: bool = True) -> None:
        super().__init__(lm, packs)
        self.name_of_head = linear_head(lm, 1)

    def forward(self, batch: Batch, coefficients_S: Tensor | None = None) -> ScoreReading:
        """Reads the ends of the branches and the sites, in the precision of the head's weights."""
        assert coefficients_S is None, "no coefficient is known before the scores are"
        linear = self.lm.get_submodule(self.name_of_head)
        read_XD = self.hidden(batch).index_select(0, torch.cat([batch.end_index_N, batch.site_index_S]))
        found_X = linear(read_XD.to(next(linear.parameters()).dtype))[:, 0]
        scores_N, values_S = found_X.split([len(batch.end_index_N), len(batch.site_index_S)])
        return ScoreReading(scores_N, values_S)


class ClassRoot(Trunk):
    """A causal trunk with a head of several classes, read once for each branch."""

    def __init__(self, lm: PreTrainedModel, *, packs: bool = True) -> None:
        super().__init__(lm, packs)
        self.name_of_head = linear_head(lm, len(lm.config.id2label or {}))

    def forward(self, batch: Batch, coefficients_S: Tensor | None = None) -> ClassReading:
        """Reads the ends of the branches, in the precision of the head's weights."""
        assert coefficients_S is None, "no coefficient is known before the logits are"
        linear = self.lm.get_submodule(self.name_of_head)
        end_ND = self.hidden(batch).index_select(0, batch.end_index_N)
        return ClassReading(linear(end_ND.to(next(linear.parameters()).dtype)))


class ActorCritic(nn.Module):
    """A policy and its critic, trained together; where one of them cannot be packed, both get padded rows."""

    def __init__(self, policy: Root, critic: ScoreRoot) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic
        self.packs = policy.packs and critic.packs
        for part in () if self.packs else (policy, critic):
            leave_packed(part.lm)
            part.packs = False

    def batch(self, examples: list) -> Batch:
        """The examples in the form that both models take."""
        return self.policy.batch(examples)

    def forward(self, batch: Batch, coefficients_S: Tensor | None = None) -> ActorCriticReading:
        """Log-probabilities and values at the same sites."""
        return ActorCriticReading(self.policy(batch, coefficients_S).logprobs_S, self.critic(batch).values_S)


def linear_head(lm: PreTrainedModel, outputs: int) -> str:
    """The name of the one linear layer of so many outputs outside the trunk. Raises ConfigError where there is none."""
    inside = {id(module) for module in lm.base_model.modules()}
    found = [name for name, module in lm.named_modules()
             if isinstance(module, nn.Linear) and module.out_features == outputs and id(module) not in inside]
    if len(found) != 1:
        numbers = "one number" if outputs == 1 else f"{outputs} numbers"
        raise ConfigError(f"{type(lm).__name__} has no head of {numbers}")
    return found[0]


def projection(lm: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """The weight [V, D] and the bias [V] of the vocabulary head as they are now, with what adapters make of them."""
    output = lm.get_output_embeddings()
    # peft's wrapper of a head of which some rows are trained hands out its weight only; none with a bias gets one
    return output.weight, None if unwrapped(output).bias is None else output.bias


def head_shape(lm: PreTrainedModel) -> head.Shape:
    """What the model does to its logits, as its config says. Raises ConfigError for a head that is no projection."""
    output = unwrapped(lm.get_output_embeddings())
    if not isinstance(output, nn.Linear):
        raise ConfigError(f"the vocabulary head of {type(lm).__name__} is a {type(output).__name__}, not a plain linear "
                          "layer, and cannot be trained here", hint="Leave the head out of lora_target.")
    config = lm.config.to_dict()
    scale = config.get("logit_scale") or 1.0
    if config.get("logits_scaling"):
        scale /= config["logits_scaling"]
    return head.Shape(float(scale), config.get("final_logit_softcapping"))


@torch.no_grad()
def check_head(root: Root) -> None:
    """Compares the head with the model's own logits on a few tokens. Raises ConfigError where they differ."""
    config = root.lm.config
    ids = torch.arange(1, 9, device=root.lm.device)[None] % config.vocab_size
    with evaluating(root):
        output = root.lm(input_ids=ids, output_hidden_states=False, use_cache=False).logits[0].float().log_softmax(-1)
        hidden = root.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    weight_VD, bias_V = projection(root.lm)
    y = ids[0].roll(-1)
    own = head.logprobs(hidden, weight_VD, y, bias_V=bias_V, shape=root.shape,
                        workspace=head.Workspace()).logprobs_S.float()
    difference = float((own - output.gather(1, y[:, None])[:, 0]).abs().max())
    if not difference < 1e-2:
        raise ConfigError(f"{type(root.lm).__name__} does something to its logits that danlu does not know: its own "
                          f"log-probabilities differ by {difference:.3g}", hint="This model cannot be trained here.")
