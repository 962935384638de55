"""Every check and timing that needs a GPU, in one command: `python bench/gpu.py`.

1. packed trees give the log-probabilities and gradients of the CPU (float32, and bf16 autocast within its precision)
2. the head: chunked with gradients in the forward pass, beside plain logits with `F.cross_entropy`
3. tokens per second of whole training steps

Prints one line per check; ends with code 1 where a check fails, and with code 2 where there is no GPU.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from danlu.core.examples import Branch, Example
from danlu.data.loader import Loader
from danlu.data.store import ExampleStore, write_examples
from danlu.models import head
from danlu.models.load import why_not_packed
from danlu.models.root import Root
from danlu.objectives.language import Language
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
    root = Root(AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32))
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
    fine = check_equal()
    time_head()
    time_training()
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
