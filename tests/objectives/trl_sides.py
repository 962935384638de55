"""TRL's trainers and danlu's objectives on the same ragged answers, from equal weights in float64, for tests that compare.

TRL prepares its data, collates its padded batch and computes its loss by its own code; danlu packs the same token ids and
takes the reference's log-probabilities from the column `ref_logprobs`. TRL's vocabulary head computes in float32 whatever
the model's dtype: with it the two agree to float32's rounding, and with that one function computed in the model's dtype
(`ExactHead`) to float64's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from small_models import exact_norms
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from danlu.core.examples import Branch, Example
from danlu.data.batch import Batch
from danlu.models import attention
from danlu.models.root import Root
from danlu.objectives.branches import Coupled

VOCAB, BETA = 64, 0.3
WORDS = [f"w{number}" for number in range(VOCAB - 3)]
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected")


@contextmanager
def quiet_trl() -> Iterator[Any]:
    """TRL, told to report nothing to anybody."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_DATASETS_OFFLINE": "1",
                            "WANDB_MODE": "disabled", "TRACKIO_MODE": "disabled", "TRL_EXPERIMENTAL_SILENCE": "1"}.items():
            patch.setenv(name, value)
        from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
        from trl.experimental.cpo import CPOConfig, CPOTrainer
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer
        from trl.trainer import utils
        pairs = {"dpo": (DPOConfig, DPOTrainer), "kto": (KTOConfig, KTOTrainer), "cpo": (CPOConfig, CPOTrainer),
                 "orpo": (ORPOConfig, ORPOTrainer)}
        for _, trainer in pairs.values():
            patch.setattr(trainer, "_send_telemetry", lambda self: None, raising=False)
        yield SimpleNamespace(utils=utils, **pairs)


class ExactHead:
    """TRL's tiled vocabulary head as one plain expression in the model's dtype; autograd does the rest."""

    @staticmethod
    def apply(hidden_SD: Tensor, weight_VD: Tensor, bias: Tensor | None, target_S: Tensor, temperature: float, *rest: Any
              ) -> tuple[Tensor | None, ...]:
        assert bias is None and temperature == 1.0 and rest[1:3] == (None, 1.0)
        logits = hidden_SD @ weight_VD.t()
        logp = logits.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1).detach()
        squares = (2 * logp).logsumexp(-1).detach() if "log_sum_sq_probs" in rest[3] else None
        top = logits.argmax(-1) == target_S
        return logp.gather(1, target_S[:, None])[:, 0], entropy, squares, logits.mean(-1).detach(), top


def tokenizer() -> PreTrainedTokenizerFast:
    """One id a word."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def words(rng: np.random.Generator, longest: int) -> str:
    return "".join(f" {word}" for word in rng.choice(WORDS, rng.integers(1, longest + 1)))


def texts(count: int, seed: int = 5, longest_prompt: int = 9) -> list[dict[str, str]]:
    """Prompts of 1 to 9 words, answers of 1 to 12."""
    rng = np.random.default_rng(seed)
    return [{"prompt": words(rng, longest_prompt), "chosen": words(rng, 12), "rejected": words(rng, 12)}
            for _ in range(count)]


def policy_and_reference() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """Two layers of width 16 in float64; the policy has moved away from the reference by a good part of its weights."""
    torch.manual_seed(4)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False, eos_token_id=1,
                         pad_token_id=0)
    reference = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    exact_norms(reference)
    policy = deepcopy(reference.double())
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return policy, reference


@dataclass
class Side:
    """What one of the two found: the mean loss of the units, its gradient by parameter, and the metrics."""

    loss: float
    gradients: dict[str, Tensor]
    metrics: dict[str, float]


def differences(left: Side, right: Side) -> tuple[float, float]:
    """Of the losses, and the largest of any parameter's gradient relative to the largest gradient there is."""
    assert left.gradients.keys() == right.gradients.keys() and left.metrics.keys() == right.metrics.keys()
    largest = max(float(gradient.abs().max()) for gradient in right.gradients.values())
    apart = max(float((left.gradients[name] - right.gradients[name]).abs().max()) for name in right.gradients)
    return abs(left.loss - right.loss), apart / largest


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    assert all(parameter.grad is not None for parameter in model.parameters())
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@dataclass
class Theirs:
    """One of TRL's trainers with its data prepared and nothing trained."""

    trainer: Any
    names: tuple[str, ...] = METRICS

    def rows(self, which: slice) -> list[dict[str, Any]]:
        return list(self.trainer.train_dataset)[which]

    def side(self, which: slice) -> Side:
        """The loss, as its training step would compute it, of the rows collated into one padded batch."""
        trainer = self.trainer
        stored = trainer._metrics["train"] if hasattr(trainer, "_metrics") else trainer._stored_metrics["train"]
        stored.clear()
        trainer.model.zero_grad()
        trainer.model.train()
        inputs = trainer._prepare_inputs(trainer.data_collator(self.rows(which)))
        torch.set_default_dtype(trainer.model.dtype)  # they make a tensor of a setting
        try:
            loss = trainer.compute_loss(trainer.model, inputs)
        finally:
            torch.set_default_dtype(torch.float32)
        loss.backward()
        return Side(loss.item(), gradients(trainer.model), {name: float(stored[name][0]) for name in self.names})


def make_theirs(pair: tuple[Any, Any], folder: Path, policy: LlamaForCausalLM, reference: LlamaForCausalLM | None,
                data: list[dict[str, Any]], names: tuple[str, ...] = METRICS, **options: Any) -> Theirs:
    """The trainer of a pair of its config and itself."""
    arguments = pair[0](**{"output_dir": str(folder), "beta": BETA, "use_cpu": True, "bf16": False, "report_to": "none",
                           "gradient_checkpointing": False, "max_length": None, "disable_tqdm": True,
                           "save_strategy": "no"} | options)
    models = {"model": deepcopy(policy)} | ({} if reference is None else {"ref_model": deepcopy(reference)})
    return Theirs(pair[1](**models, args=arguments, processing_class=tokenizer(), train_dataset=Dataset.from_list(data)),
                  names)


def pair_examples(rows: list[dict[str, Any]]) -> list[Example]:
    """TRL's prepared pairs as trees."""
    return [Example(row["prompt_ids"], (Branch(row["chosen_ids"]), Branch(row["rejected_ids"]))) for row in rows]


def ours(objective: Any, policy: LlamaForCausalLM, reference: LlamaForCausalLM | None, examples: Sequence[Example], *,
         stored: bool = False, at_once: int = 100, statistics: bool = False, names: tuple[str, ...] = METRICS) -> Side:
    """The same rows as packed trees, `at_once` in each micro-batch, with the reference's column if there is a reference.

    With `stored` the reference's numbers go through an Example, as float32.
    """
    roots = []
    for model in (policy, reference or policy):
        model = deepcopy(model)
        model.set_attn_implementation(attention.NAME)
        roots.append(Root(model))
    root = roots[0]
    root.statistics = statistics
    batches = []
    for start in range(0, len(examples), at_once):
        batch = Batch.pack(examples[start:start + at_once])
        if reference is not None:
            with torch.no_grad():
                ref_S = roots[1](batch).logprobs_S
            batch = replace(batch, columns={**batch.columns, "ref_logprobs": ref_S.float() if stored else ref_S})
        batches.append(batch)
    parts = [objective] * len(batches)
    if isinstance(objective, Coupled):
        with torch.no_grad():
            parts = objective.shares([objective.survey(root(batch), batch) for batch in batches])
    count, loss, sums = sum(map(objective.count, batches)), 0.0, dict[str, float]()
    for part, batch in zip(parts, batches, strict=True):
        found = part(root(batch, coefficients_S=part.coefficients(batch)), batch)
        (found.total / count).backward()
        loss += found.total.item() / count
        for name, value in found.metrics.items():
            sums[name] = sums.get(name, 0.0) + value.item()
    metrics = {name: sums[name] / sums.get(f"count/{name}", count) for name in names}
    return Side(loss, gradients(root.lm), metrics)
