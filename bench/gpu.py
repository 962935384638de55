"""Every check and timing that needs a GPU, in one command: `python bench/gpu.py`.

1. packed trees give the log-probabilities and gradients of the CPU (float32, and bf16 autocast within its precision)
2. the head: chunked with gradients in the forward pass, beside plain logits with `F.cross_entropy`
3. scores, values and DPO's loss of the CPU; greedy answers of the CPU; a rollout's first ratio is 1
4. tokens per second of whole training steps, seconds of a PPO rollout with its passes

Prints one line per check; ends with code 1 where a check fails, and with code 2 where there is no GPU.
"""

import copy
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from danlu.core.examples import Branch, Example
from danlu.data.loader import Loader
from danlu.data.store import ExampleStore, write_examples
from danlu.models import head
from danlu.models.generate import generate
from danlu.models.load import why_not_packed
from danlu.models.root import ActorCritic, Root, ScoreRoot
from danlu.objectives.language import Language
from danlu.objectives.policy import PPO
from danlu.objectives.preference import DPO
from danlu.rollout.source import Estimator, RolloutSource, Sampler
from danlu.train.parallel import World
from danlu.train.trainer import Trainer, TrainSettings

VOCAB = 32_000
CONFIG = LlamaConfig(vocab_size=VOCAB, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
                     num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=True)


def trees(seed: int, count: int, longest: int) -> list[Example]:
    """Random stems with one to three branches."""
    draw = np.random.default_rng(seed)
    return [Example(draw.integers(0, VOCAB, draw.integers(0, longest)),
                    tuple(Branch(draw.integers(0, VOCAB, draw.integers(2, longest))) for _ in range(draw.integers(1, 4))))
            for _ in range(count)]


def new_root() -> Root:
    """A random Llama in float32."""
    torch.manual_seed(0)
    root = Root(AutoModelForCausalLM.from_config(copy.deepcopy(CONFIG), dtype=torch.float32))  # it is changed by the model
    reason = why_not_packed(root)  # sets the attention, too
    assert reason is None, reason
    return root


def reading(root: Root, examples: list[Example], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities, the embedding's gradient) of Σ logp, on the CPU."""
    root.to(device).zero_grad()
    batch = root.batch(examples).to(device)
    found = root(batch, coefficients_S=Language().coefficients(batch))
    assert found.total is not None
    found.total.backward()
    gradient = root.lm.get_input_embeddings().weight.grad
    return found.logprobs_S.float().cpu(), gradient.float().cpu()


def check_equal() -> bool:
    """The GPU against the CPU."""
    examples, root, fine = trees(1, 6, 60), new_root(), True
    logp, gradient = reading(root, examples, "cpu")
    for name, precision, tolerance in (("float32", None, 1e-3), ("bf16", torch.bfloat16, 8e-2)):
        root.autocast = precision
        own, own_gradient = reading(root, examples, "cuda")
        far = float((own - logp).abs().max())
        angle = float(F.cosine_similarity(own_gradient.flatten(), gradient.flatten(), dim=0))
        good = far < tolerance and angle > 0.99
        print(f"packed trees, {name}: log-probabilities within {far:.2g}, gradients' cosine {angle:.5f} "
              f"{'ok' if good else 'WRONG'}")
        fine &= good
    return fine


def preferences(seed: int, count: int) -> list[Example]:
    """Random pairs with a reference that is the same everywhere."""
    draw = np.random.default_rng(seed)

    def branch() -> Branch:
        size = int(draw.integers(4, 40))
        return Branch(draw.integers(0, VOCAB, size), np.ones(size), {"ref_logprobs": np.full(size, -9.0)})

    return [Example(draw.integers(0, VOCAB, draw.integers(5, 60)), (branch(), branch())) for _ in range(count)]


def new_scorer() -> ScoreRoot:
    """A random scalar model in float32."""
    torch.manual_seed(1)
    config = copy.deepcopy(CONFIG)
    config.num_labels, config.pad_token_id = 1, 0
    root = ScoreRoot(AutoModelForSequenceClassification.from_config(config, dtype=torch.float32))
    assert why_not_packed(root) is None
    return root


def check_aligned() -> bool:
    """Reward model, DPO and generator on the GPU against the CPU."""
    examples, scorer, policy = preferences(2, 8), new_scorer().eval(), new_root().eval()
    prompts = [example.stem.tolist() for example in examples]
    found: dict[str, list] = {}
    for device in ("cpu", "cuda"):
        scorer.to(device), policy.to(device)
        batch = scorer.batch(examples).to(device)
        with torch.no_grad():
            read = scorer(batch)
            loss = DPO()(policy(batch), batch).total
        answers = generate(policy.lm, prompts, max_new_tokens=24, stop_ids=[], pad_id=0)
        found[device] = [read.scores_N.cpu(), read.values_S.cpu(), loss.cpu(), [answer.tokens for answer in answers]]
    far = [float((one - other).abs().max()) for one, other in zip(found["cpu"][:3], found["cuda"][:3])]
    alike = np.mean([one == other for one, other in zip(found["cpu"][3], found["cuda"][3])])
    good = max(far) < 1e-3 and alike > 0.7  # random weights: two tokens may be equally likely
    print(f"scores within {far[0]:.2g}, values {far[1]:.2g}, DPO's loss {far[2]:.2g}, greedy answers alike {alike:.0%} "
          f"{'ok' if good else 'WRONG'}")
    return good


def check_rollouts() -> bool:
    """PPO on the GPU: the first ratio of every rollout, and the time of a rollout with its passes."""
    draw = np.random.default_rng(3)
    trained, frozen = ActorCritic(new_root(), new_scorer()).to("cuda"), new_root().to("cuda")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "store").mkdir()
        prompts = (Example(draw.integers(0, VOCAB, 64), (Branch(np.zeros(0)),)) for _ in range(256))
        write_examples(folder / "store", prompts, VOCAB)
        sampler = Sampler(trained, new_scorer().to("cuda"), lambda: nullcontext(frozen), [1], VOCAB, 128, 1.0,
                          torch.device("cuda"), 16384, 256, 1.0, 4)
        loader = Loader(ExampleStore(folder / "store"), seed=0, global_batch_size=32)
        source = RolloutSource(loader, sampler, Estimator(), 0, 2, 1)
        settings = TrainSettings(max_steps=8, learning_rate=1e-5, plot_loss=False, save_steps=10**6)
        infos = list(Trainer(trained, PPO(), source, settings, folder, World.current("cuda"), 0, "gpu").fit())
    ratio = infos[0].metrics["ratio"]
    seconds = np.median([one.seconds + other.seconds for one, other in zip(infos[2::2], infos[3::2])])
    good = abs(ratio - 1) < 1e-3
    print(f"PPO: first ratio {ratio:.6f} {'ok' if good else 'WRONG'}; 128 answers of 128 tokens, 2 passes: {seconds:.2f} s")
    return good


def timed(action: Callable[[], object], rounds: int = 10) -> float:
    """Seconds of one call, the median of several, the device waited for."""
    times = []
    for _ in range(rounds + 2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        action()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return float(np.median(times[2:]))


def time_head() -> None:
    """The head alone, forward and backward, 8,192 sites."""
    h = torch.randn(8192, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(VOCAB, 1024, device="cuda", dtype=torch.float32, requires_grad=True)
    y = torch.randint(0, VOCAB, (8192,), device="cuda")
    c, room = -torch.ones(8192, device="cuda"), head.Workspace()
    own = timed(lambda: head.weighted_sum(h, w, y, c, workspace=room)[0].backward())
    plain = timed(lambda: F.cross_entropy((h @ w.bfloat16().t()).float(), y, reduction="sum").backward())
    print(f"head, 8,192 sites × {VOCAB:,}: danlu {own * 1e3:.2f} ms, plain logits {plain * 1e3:.2f} ms")


def time_training() -> None:
    """Whole optimizer steps of 32,768 tokens."""
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "store").mkdir()
        write_examples(folder / "store", (Example([], (Branch(draw.integers(0, VOCAB, 1024)),)) for _ in range(256)), VOCAB)
        root = new_root().to("cuda")
        root.autocast = torch.bfloat16
        settings = TrainSettings(max_steps=12, global_batch_tokens=32_768, plot_loss=False, save_steps=10**6)
        loader = Loader(ExampleStore(folder / "store"), seed=0, global_batch_tokens=32_768)
        trainer = Trainer(root, Language(), loader, settings, folder, World.current("cuda"), 0, "gpu")
        speeds = [info.num_tokens / info.seconds for info in trainer.fit()]
        print(f"training, {sum(p.numel() for p in root.parameters()) / 1e6:.0f} M parameters, bf16: "
              f"{np.median(speeds[3:]):,.0f} tokens/s, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def main() -> int:
    """All of it."""
    if not torch.cuda.is_available():
        print("no GPU here")
        return 2
    print(torch.cuda.get_device_name(), torch.__version__)
    fine = check_equal() & check_aligned() & check_rollouts()
    time_head()
    time_training()
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
