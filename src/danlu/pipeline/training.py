"""What pre-training and fine-tuning share: the settings of the machine, the training itself, the forecast."""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from danlu.core.artifact import fresh_folder
from danlu.core.config import Config, free
from danlu.core.errors import ConfigError, DataError
from danlu.pipeline.context import Amount, Context, Forecast, Input
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
    loaded = load()
    check_length(loaded.lm.config, settings.cutoff_len)
    context.keep.mkdir(parents=True, exist_ok=True)
    if settings.precision == "bf16" or (settings.precision == "auto" and world.device.type == "cuda"):
        loaded.root.autocast = torch.bfloat16
    if settings.gradient_checkpointing:
        loaded.lm.gradient_checkpointing_enable()
    for note in loaded.notes:
        context.console.print(note)
    evaluate = None
    if prepared.held_out is not None:
        tokens = settings.micro_batch_tokens or DEFAULT_MICRO_BATCH_TOKENS[world.device.type]
        evaluate = held_out_loss(prepared.held_out, world, tokens)
    trainer = Trainer(shard(loaded.root, world), Language(),
                      Loader(prepared.train, seed=context.seed, **settings.batch_size()), settings, context.keep, world,
                      context.seed, context.fingerprint, evaluate=evaluate, say=context.console.print)
    last = None
    with context.progress(f"training {context.step}", total=trainer.total_steps) as bar:
        for last in trainer.fit():
            bar.update(last.step, loss=last.loss, tokens_per_second=last.num_tokens / max(last.seconds, 1e-9))
    whole = _whole(loaded, load, world)
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
    return _metrics(context.work, prepared, trainer.state) if world.is_main else {}


def _whole(loaded: "Loaded", load: "Callable[[], Loaded]", world: "World") -> "Loaded | None":
    """The trained model in one piece: for the main process, or None on the others."""
    if world.size == 1:
        return loaded
    # gathering a tensor is something that all processes do together
    tensors = {name: value.full_tensor() if hasattr(value, "full_tensor") else value
               for name, value in loaded.root.named_parameters()}
    if not world.is_main:
        return None
    whole = load()
    whole.root.load_state_dict({name: value.detach() for name, value in tensors.items()}, strict=False)
    return whole


def _metrics(work: Path, prepared: Prepared, state: Any) -> dict[str, Any]:
    lines = [json.loads(line) for line in (work / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    evals = [line["eval_loss"] for line in lines if line.get("eval_loss") is not None]
    metrics = {"steps": state.step, "tokens": state.num_input_tokens_seen, "train_loss": losses[-1],
               "num_examples": len(prepared.train), "num_targets": prepared.train.num_targets,
               "examples": prepared.artifact.folder.name, "skipped_steps": state.num_skipped}
    if evals:
        metrics |= {"eval_loss_before": evals[0], "eval_loss": evals[-1], "best_eval_loss": min(evals)}
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

    records, data_bytes, exact = 0.0, 0.0, False
    for text in settings.datasets():
        item = inputs[text]
        facts = item.forecast.facts if item.forecast else {}
        if item.produces == "corpus" and item.artifact is not None:
            data_bytes += item.artifact.metrics["train"]["bytes"]
        elif "bytes" in facts:
            data_bytes += facts["bytes"]
        elif item.kind == "task":
            count = settings.max_samples or DEFAULT_TASK_PROMPTS
            records += count
            data_bytes += count * task_tokens * ASSUMED_BYTES_PER_TOKEN
        else:
            data_bytes += sum(path.stat().st_size for path in item.files)
    tokens = data_bytes / ASSUMED_BYTES_PER_TOKEN
    examples = records + max(1.0, (tokens - records * task_tokens) / mean_length)
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
    memory = size.training_bytes(int(min(settings.micro_batch_tokens or 4096, per_step)),
                                 0.02 if settings.finetuning_type == "lora" else 1.0)
    notes.append(f"{size.parameters / 1e6:.1f} M parameters")
    return Forecast(Amount(trained, False), Amount(steps, exact), Amount(flops, False), Amount(memory, False),
                    Amount(flops / (machine_flops() * ASSUMED_EFFICIENCY), False), notes,
                    {"parameters": size.parameters, "config": config})


def model_config(settings: Any, inputs: Mapping[str, Input]) -> Any:
    """The config of the model that a step trains; None while it is not known (its step or tokenizer has not run)."""
    from transformers import AutoConfig

    from danlu.models.load import load_tokenizer, new_config

    if isinstance(settings.model, dict):
        item = inputs[settings.tokenizer]
        if item.folder is not None:
            return new_config(settings.model, load_tokenizer(item.folder))
        size = item.forecast.facts.get("vocab_size") if item.forecast else None
        return None if size is None else new_config(settings.model, None, int(size))
    item = inputs[settings.model]
    if item.folder is not None:
        try:
            return AutoConfig.from_pretrained(str(item.folder))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"no model could be opened: {reason}", where=str(item.folder)) from None
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
