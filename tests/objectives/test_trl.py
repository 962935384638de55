"""danlu's DPO beside TRL's own DPOTrainer: the same loss and the same gradient on the same ragged pairs.

TRL prepares its data, collates its padded batch and computes its loss by its own code; danlu packs the same token ids and
takes the reference's log-probabilities from the column `ref_logprobs`. Both start from equal weights in float64. TRL's
vocabulary head computes in float32 whatever the model's dtype: with it the two agree to float32's rounding, and with that
one function computed in the model's dtype to float64's.
"""

from collections.abc import Iterator
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
from danlu.objectives.preference import DPO

VOCAB, BETA = 64, 0.3
WORDS = [f"w{number}" for number in range(VOCAB - 3)]


@pytest.fixture(scope="module")
def trl() -> Iterator[Any]:
    """TRL, told to report nothing to anybody."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_DATASETS_OFFLINE": "1",
                            "WANDB_MODE": "disabled", "TRACKIO_MODE": "disabled"}.items():
            patch.setenv(name, value)
        from trl import DPOConfig, DPOTrainer
        from trl.trainer import utils
        patch.setattr(DPOTrainer, "_send_telemetry", lambda self: None)
        yield SimpleNamespace(DPOConfig=DPOConfig, DPOTrainer=DPOTrainer, utils=utils)


class ExactHead:
    """TRL's tiled vocabulary head as one plain expression in the model's dtype; autograd does the rest."""

    @staticmethod
    def apply(hidden_SD: Tensor, weight_VD: Tensor, bias: Tensor | None, target_S: Tensor, temperature: float, *rest: Any
              ) -> tuple[Tensor | None, ...]:
        assert bias is None and temperature == 1.0 and rest[1:3] == (None, 1.0)
        logits = hidden_SD @ weight_VD.t()
        logp = logits.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1).detach()
        top = logits.argmax(-1) == target_S
        return logp.gather(1, target_S[:, None])[:, 0], entropy, None, logits.mean(-1).detach(), top


def tokenizer() -> PreTrainedTokenizerFast:
    """One id a word."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def texts(count: int, seed: int = 5) -> list[dict[str, str]]:
    """Prompts of 1 to 9 words, answers of 1 to 12."""
    rng = np.random.default_rng(seed)

    def words(longest: int) -> str:
        return "".join(f" {word}" for word in rng.choice(WORDS, rng.integers(1, longest + 1)))

    return [{"prompt": words(9), "chosen": words(12), "rejected": words(12)} for _ in range(count)]


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
    """What one of the two found: the mean loss of the pairs, its gradient by parameter, and the metrics."""

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
    """TRL's trainer with its data prepared and nothing trained."""

    trainer: Any

    def rows(self, which: slice) -> list[dict[str, Any]]:
        return list(self.trainer.train_dataset)[which]

    def side(self, which: slice) -> Side:
        """The loss, as its training step would compute it, of the rows collated into one padded batch."""
        trainer = self.trainer
        trainer.model.zero_grad()
        trainer._metrics["train"].clear()
        trainer.model.train()
        inputs = trainer._prepare_inputs(trainer.data_collator(self.rows(which)))
        lengths = inputs["attention_mask"].sum(1)
        assert lengths.min() < lengths.max() or len(self.rows(which)) == 1, "ragged rows"
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        names = {"rewards/chosen": "rewards/chosen", "rewards/rejected": "rewards/rejected", "margin": "rewards/margins",
                 "accuracy": "rewards/accuracies", "logps/chosen": "logps/chosen", "logps/rejected": "logps/rejected"}
        metrics = {name: trainer._metrics["train"][theirs][0] for name, theirs in names.items()}
        return Side(loss.item(), gradients(trainer.model), metrics)


def make_theirs(trl: Any, folder: Path, policy: LlamaForCausalLM, reference: LlamaForCausalLM, **options: Any) -> Theirs:
    arguments = trl.DPOConfig(output_dir=str(folder), beta=BETA, use_cpu=True, bf16=False, report_to="none",
                              gradient_checkpointing=False, max_length=None, disable_tqdm=True, save_strategy="no",
                              **options)
    return Theirs(trl.DPOTrainer(deepcopy(policy), deepcopy(reference), arguments, processing_class=tokenizer(),
                                 train_dataset=Dataset.from_list(texts(6))))


def ours(objective: DPO, policy: LlamaForCausalLM, reference: LlamaForCausalLM, rows: list[dict[str, Any]],
         stored: bool = False) -> Side:
    """The same rows as packed trees. With `stored` the reference's numbers go through an Example, as float32."""
    roots = []
    for model in (policy, reference):
        model = deepcopy(model)
        model.set_attn_implementation(attention.NAME)
        roots.append(Root(model))
    examples = [Example(row["prompt_ids"], (Branch(row["chosen_ids"]), Branch(row["rejected_ids"]))) for row in rows]
    batch = Batch.pack(examples)
    with torch.no_grad():
        ref_S = roots[1](batch).logprobs_S
    batch = replace(batch, columns={"ref_logprobs": ref_S.float() if stored else ref_S})
    loss = objective(roots[0](batch), batch)
    count = objective.count(batch)
    (loss.total / count).backward()
    names = ("rewards/chosen", "rewards/rejected", "margin", "accuracy", "logps/chosen", "logps/rejected")
    metrics = {name: loss.metrics[name].item() / count for name in names}
    return Side(loss.total.item() / count, gradients(roots[0].lm), metrics)


def test_loss_and_gradient_equal_trls(trl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl.utils, "_ChunkedLogProbFunction", ExactHead)
    models = policy_and_reference()
    theirs = make_theirs(trl, tmp_path, *models, loss_type=["sigmoid"])
    left, right = ours(DPO(BETA), *models, theirs.rows(slice(None))), theirs.side(slice(None))
    assert abs(right.loss - np.log(2)) > 0.01 and 0 < right.metrics["accuracy"] < 1, "the two have drifted apart"
    loss, gradient = differences(left, right)
    assert loss < 1e-9 and gradient < 1e-9, (loss, gradient)
    assert left.metrics == pytest.approx(right.metrics, rel=1e-6)  # some of theirs are float32
    rounded = ours(DPO(BETA), *models, theirs.rows(slice(None)), stored=True)
    assert max(differences(rounded, right)) < 1e-6


def test_with_trls_own_head_they_agree_to_float32(trl: Any, tmp_path: Path) -> None:
    models = policy_and_reference()
    theirs = make_theirs(trl, tmp_path, *models, loss_type=["sigmoid"])
    found = differences(ours(DPO(BETA), *models, theirs.rows(slice(None))), theirs.side(slice(None)))
    assert max(found) < 2e-6, found


def test_the_additive_form_equals_trls_sum_of_losses(trl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL adds α times the `sft` loss, a mean over all chosen tokens of a batch; on one pair that is the answer's mean."""
    monkeypatch.setattr(trl.utils, "_ChunkedLogProbFunction", ExactHead)
    models = policy_and_reference()
    theirs = make_theirs(trl, tmp_path, *models, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.7])
    for place in range(3):
        own = slice(place, place + 1)
        found = differences(ours(DPO(BETA, rpo_alpha=0.7), *models, theirs.rows(own)), theirs.side(own))
        assert max(found) < 1e-9, found


def test_equal_weights_begin_at_the_logarithm_of_two(trl: Any, tmp_path: Path) -> None:
    _, reference = policy_and_reference()
    theirs = make_theirs(trl, tmp_path, reference, reference, loss_type=["sigmoid"])
    left = ours(DPO(BETA), reference, reference, theirs.rows(slice(None)))
    assert left.loss == pytest.approx(np.log(2), abs=1e-12) and theirs.side(slice(None)).loss == pytest.approx(np.log(2))
    assert left.metrics["margin"] == 0 and left.metrics["accuracy"] == 0.5


def test_the_comparison_can_fail(trl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another β, and answers that end one token early, are seen at once."""
    monkeypatch.setattr(trl.utils, "_ChunkedLogProbFunction", ExactHead)
    models = policy_and_reference()
    theirs = make_theirs(trl, tmp_path, *models, loss_type=["sigmoid"])
    right, rows = theirs.side(slice(None)), theirs.rows(slice(None))
    assert min(differences(ours(DPO(BETA * 1.001), *models, rows), right)) > 1e-6
    cut = [{name: ids[:-1] if name == "chosen_ids" else ids for name, ids in row.items()} for row in rows]
    assert min(differences(ours(DPO(BETA), *models, cut), right)) > 1e-4
