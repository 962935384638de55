"""What pre-training and fine-tuning share: the settings of the machine, the training itself, the forecast."""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from danlu.core.artifact import digest, fresh_folder
from danlu.core.config import Config, free
from danlu.core.errors import ConfigError, DataError
from danlu.pipeline.context import TASK, Amount, Context, Forecast, Input
from danlu.pipeline.examples import DataConfig, Prepared

if TYPE_CHECKING:
    from danlu.models.load import Loaded
    from danlu.train.parallel import World

PEAK_TRIALS = 3
ASSUMED_EFFICIENCY = 0.55  # of the machine's matrix product, for whole training steps of small models
ASSUMED_BYTES_PER_TOKEN = 3.2
DEFAULT_TASK_PROMPTS = 10_000


class MachineConfig(Config):
    """Where and how precisely to compute."""

    device: Literal["auto", "cpu", "cuda"] = free("auto", description="where to train")
    precision: Literal["auto", "float32", "bf16"] = Field("auto", description="of the arithmetic; weights stay float32")
    gradient_checkpointing: bool = free(False, description="compute activations again instead of keeping them")


def check_evaluation(settings: Any, held_out: bool) -> None:
    """Raises ConfigError where evaluations are asked for and nothing is held out to evaluate on."""
    if settings.eval_steps is not None and not held_out:
        raise ConfigError("eval_steps is set, but there is nothing to evaluate on", key="eval_steps",
                          hint="Set eval_dataset, or val_size to hold out a share.")


def run_training(context: Context, settings: Any, prepared: Prepared, load: "Callable[[], Loaded]",
                 stop_ids: list[int]) -> dict[str, Any]:
    """Trains a model on prepared examples, writes it into the work folder and returns the metrics.

    `load` opens the model as it is before training; with several processes it is called again to save the result whole.
    """
    import torch

    from danlu.data.loader import Loader
    from danlu.models.load import check_length, save_model
    from danlu.objectives.language import Language
    from danlu.train.evaluate import held_out_loss
    from danlu.train.parallel import World, shard
    from danlu.train.trainer import DEFAULT_MICRO_BATCH_TOKENS, Trainer

    world = World.current(None if settings.device == "auto" else settings.device)
    precision = settings.precision
    if precision == "auto":
        precision = "bf16" if world.device.type == "cuda" else "float32"
    loaded = load()
    check_length(loaded.lm.config, settings.cutoff_len)
    context.keep.mkdir(parents=True, exist_ok=True)
    if precision == "bf16":
        loaded.root.autocast = torch.bfloat16
    if settings.gradient_checkpointing:
        loaded.lm.gradient_checkpointing_enable()
    for note in loaded.notes:
        context.console.print(note, markup=False)
    evaluate = None
    if prepared.held_out is not None:
        tokens = settings.micro_batch_tokens or DEFAULT_MICRO_BATCH_TOKENS[world.device.type]
        evaluate = held_out_loss(prepared.held_out, world, tokens)
    trainer = Trainer(shard(loaded.root, world), Language(),
                      Loader(prepared.train, seed=context.seed, **settings.batch_size()), settings, context.keep, world,
                      context.seed, digest([context.fingerprint, precision]), evaluate=evaluate, say=context.console.print)
    last = None
    with context.progress(f"training {context.step}", total=trainer.total_steps) as bar:
        for last in trainer.fit():
            bar.update(last.step, loss=last.loss, tokens_per_second=last.num_tokens / max(last.seconds, 1e-9))
    whole = loaded if world.size == 1 else _gathered(loaded, load, world)
    if whole is not None:
        if trainer.state.num_skipped == trainer.state.step:
            raise DataError("no step of this training had a finite loss and gradient; nothing was learned or saved",
                            hint="Lower learning_rate, or look at the data with `danlu inspect`.")
        fresh_folder(context.work)  # without what an interrupted saving left
        save_model(whole, context.work, stop_ids)
        for name in ("trainer_log.jsonl", "timings.jsonl", "training_loss.png"):
            if (context.keep / name).exists():
                shutil.copyfile(context.keep / name, context.work / name)
        for name in ("ledger.json", "quarantine.jsonl"):
            if (prepared.artifact.folder / name).exists():
                shutil.copyfile(prepared.artifact.folder / name, context.work / name)
    if not world.is_main:
        return {}
    machine = {"device": world.device.type, "precision": precision, "processes": world.size}
    return _metrics(context.work, prepared, trainer.state, settings.load_best_model_at_end) | machine


def _gathered(loaded: "Loaded", load: "Callable[[], Loaded]", world: "World") -> "Loaded | None":
    """The trained model in one piece: for the main process, or None on the others."""
    from torch.distributed.tensor import DTensor

    whole = load() if world.is_main else None
    own = dict(whole.root.named_parameters()) if whole is not None else {}
    for name, value in loaded.root.named_parameters():
        # all processes gather together, and one tensor at a time, so that no device ever holds the whole model
        tensor = value.full_tensor() if isinstance(value, DTensor) else value
        if whole is not None:
            own.pop(name).data.copy_(tensor.detach())
    assert not own, "every parameter was gathered"
    return whole


def _metrics(work: Path, prepared: Prepared, state: Any, best: bool) -> dict[str, Any]:
    lines = [json.loads(line) for line in (work / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    evals = [line["eval_loss"] for line in lines if line.get("eval_loss") is not None]
    metrics = {"steps": state.step, "tokens": state.num_input_tokens_seen, "train_loss": losses[-1],
               "num_examples": len(prepared.train), "num_targets": prepared.train.num_targets,
               "examples": prepared.artifact.folder.name, "skipped_steps": state.num_skipped}
    if evals:  # of the saved weights, which may be those of an earlier step
        found = state.best_metric if best and state.best_metric is not None else evals[-1]
        metrics |= {"eval_loss_before": evals[0], "eval_loss": found, "best_eval_loss": min(evals[1:], default=evals[0])}
    return metrics


def all_texts(settings: DataConfig) -> Iterable[tuple[tuple[str | int, ...], str]]:
    """Each dataset with its key, for references."""
    for key, value, texts in (("dataset", settings.dataset, settings.datasets()),
                              ("eval_dataset", settings.eval_dataset, settings.eval_datasets())):
        for number, text in enumerate(texts):
            yield ((key,) if isinstance(value, str) else (key, number)), text


def forecast_training(settings: Any, inputs: Mapping[str, Input], config: Any, *, share_learned: float,
                      task_tokens: float, mean_length: float) -> Forecast:
    """Tokens, steps, arithmetic, memory and time of a training, from sizes on disk where nothing has been tokenised."""
    from danlu.models.flops import size_of
    from danlu.train.parallel import device_kind
    from danlu.train.trainer import DEFAULT_MICRO_BATCH_TOKENS

    records, read, exact = 0.0, 0.0, False
    for text in settings.datasets():
        item = inputs[text]
        facts = item.forecast.facts if item.forecast else {}
        if item.kind == TASK:
            records += settings.max_samples or DEFAULT_TASK_PROMPTS
            continue
        if item.produces == "corpus" and item.artifact is not None:
            found = item.artifact.metrics["train"]["bytes"]
        else:
            found = facts["bytes"] if "bytes" in facts else sum(path.stat().st_size for path in item.files)
        found /= ASSUMED_BYTES_PER_TOKEN
        read += min(found, settings.max_samples * mean_length) if settings.max_samples else found
    tokens = max(1.0, (records * task_tokens + read) * (1 - settings.val_size))  # an empty file is said when it is read
    examples = (records + max(1.0, read / mean_length)) * (1 - settings.val_size)
    per_step = settings.global_batch_tokens or settings.global_batch_size * tokens / examples
    if settings.max_steps:
        steps, exact = float(settings.max_steps), True
    else:
        steps = max(1.0, settings.num_train_epochs * tokens / per_step)
    trained = steps * per_step
    notes = []
    if config is None:
        return Forecast(Amount(trained, False), Amount(steps, exact), notes=("the model is not there yet: no size",))
    size = size_of(config)
    flops = size.training_flops(trained, trained * share_learned, mean_length)
    kind = device_kind(None if settings.device == "auto" else settings.device)
    at_once = int(min(settings.micro_batch_tokens or DEFAULT_MICRO_BATCH_TOKENS[kind], per_step))
    memory = size.training_bytes(at_once, 0.02 if settings.finetuning_type == "lora" else 1.0)
    notes.append(f"{size.parameters / 1e6:.1f} M parameters")
    if kind == "cuda":
        notes.append("the time on a GPU is not forecast")
    seconds = Amount(flops / (machine_flops() * ASSUMED_EFFICIENCY), False) if kind == "cpu" else None
    return Forecast(Amount(trained, False), Amount(steps, exact), Amount(flops, False), Amount(memory, False), seconds,
                    notes, {"parameters": size.parameters, "config": config})


def model_config(settings: Any, inputs: Mapping[str, Input]) -> Any:
    """The config of the model that a step trains; None while it is not known (its step or tokenizer has not run)."""
    from danlu.models.load import load_config, load_tokenizer, new_config

    if isinstance(settings.model, dict):
        item = inputs[settings.tokenizer]
        if item.folder is not None:
            return new_config(settings.model, load_tokenizer(item.folder))
        size = item.forecast.facts.get("vocab_size") if item.forecast else None
        return None if size is None else new_config(settings.model, None, int(size))
    item = inputs[settings.model]
    if item.folder is not None:
        return load_config(item.folder)
    return item.forecast.facts.get("config") if item.forecast else None


def machine_flops() -> float:
    """Operations per second of a float32 matrix product on this machine, measured for a few hundredths of a second."""
    a = np.ones((1024, 1024), np.float32)
    best = float("inf")
    for _ in range(PEAK_TRIALS):
        begin = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begin)
    return 2 * 1024**3 / best
