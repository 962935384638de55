"""What all stages that train share: the settings of the machine, the training itself, the forecast."""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from danlu.core.artifact import digest, fresh_folder
from danlu.core.config import Config, free
from danlu.core.errors import ConfigError, DataError
from danlu.core.examples import Noise
from danlu.pipeline.context import TASK, Amount, Context, Forecast, Input
from danlu.pipeline.examples import DataConfig, Prepared
from danlu.pipeline.losses import STATIONS, is_quarantined
from danlu.pipeline.mixing import keep_mix, loader_of, tell_mix
from danlu.pipeline.models import check_adapters, check_new_tokens, model_config

if TYPE_CHECKING:
    from danlu.data.store import ExampleStore
    from danlu.objectives.branches import Coupled
    from danlu.pipeline.sampling import Sampler
    from danlu.train.parallel import World
    from danlu.train.step import Objective
    from danlu.train.trainer import Batches, Trainer

Evaluate = Callable[[Any], Mapping[str, float]]  # figures of a root on held-out examples
PEAK_TRIALS = 3
ASSUMED_EFFICIENCY = 0.55  # of the machine's matrix product, for whole training steps of small models
ASSUMED_BYTES_PER_TOKEN = 3.2
DEFAULT_TASK_PROMPTS = 10_000
EMULATED_BF16 = ("this processor has no units for bf16, which takes many times as long as float32 then: precision: fastest "
                 "takes it only where it is faster")
HELD_OUT_PROMPTS = 1_000  # of a task, that evaluations of preferences and rollouts take at most


class MachineConfig(Config):
    """Where and how precisely to compute."""

    device: Literal["auto", "cpu", "cuda"] = free("auto", description="where to train")
    precision: Literal["auto", "fastest", "float32", "bf16"] = Field(
        "auto", description="of the arithmetic; weights stay float32. fastest: bf16 where the machine has units for it; "
                            "auto: the same on a GPU, float32 on a CPU")
    gradient_checkpointing: bool = free(False, description="compute activations again instead of keeping them")


def check_files(settings: Any, inputs: Mapping[str, Input], *names: str) -> None:
    """Raises ConfigError for settings of how files are read where a step reads tasks only."""
    unread = sorted(set(names) & settings.model_fields_set)
    if unread and all(inputs[text].kind == TASK for _, text in all_texts(settings)):
        raise ConfigError(f"“{unread[0]}” says how files are read, and this step reads none", key=unread[0])


def check_split(settings: Any, inputs: Mapping[str, Input]) -> None:
    """Raises ConfigError where a task's prompts would be split by their words."""
    if settings.val_size and any(inputs[text].kind == TASK for text in settings.datasets()):
        raise ConfigError("val_size would part the phrasings of one problem", key="val_size",
                          hint="Set eval_dataset to the task: its own held-out problems are never trained on.")


def check_evaluation(settings: Any, held_out: bool) -> None:
    """Raises ConfigError where evaluations are asked for and nothing is held out to evaluate on."""
    if settings.eval_steps is not None and not held_out:
        raise ConfigError("eval_steps is set, but there is nothing to evaluate on", key="eval_steps",
                          hint="Set eval_dataset, or val_size to hold out a share.")


def check_trained(settings: Any, inputs: Mapping[str, Input], max_new_tokens: int = 0) -> None:
    """What every step on a model and rows checks last: evaluations, adapters, the length against the model's positions."""
    from danlu.models.load import check_length

    check_evaluation(settings, settings.eval_dataset is not None or settings.val_size > 0)
    check_adapters(settings, inputs)
    check_new_tokens(settings, inputs)
    config = model_config(settings, inputs)
    if config is not None:
        check_length(config, settings.cutoff_len, max_new_tokens)


def run_training(context: Context, settings: Any, prepared: Prepared, load: "Callable[[], Any]",
                 save: "Callable[[Any, Path], None]", *, objective: "Objective | Coupled | None" = None,
                 attach: "Callable[[Prepared, Compute, Any], Prepared] | None" = None,
                 evaluate: "Callable[[ExampleStore, Compute], Evaluate] | None" = None,
                 sampler: "Callable[[World], Sampler | None]" = lambda world: None,
                 trained: "Callable[[Any, Prepared, Compute], None] | None" = None, noise: Noise | None = None
                 ) -> dict[str, Any]:
    """Trains a model on prepared examples, writes it into the work folder and returns the metrics.

    load       opens the model as it is before training; with several processes it is called again to save it whole
    save       writes what `load` gave, trained, into a folder
    objective  default: language modelling
    attach     adds columns that the model itself provides before it is trained
    evaluate   makes the evaluation on held-out examples; default: the objective's loss and metrics
    sampler    what the model is asked to say during training, by the processes that train it
    trained    is given the trained root by all processes together, before it is saved
    noise      what is done to the examples where they are drawn
    """
    from danlu.data.noisy import Noisy, NoisyStore
    from danlu.objectives.language import Language
    from danlu.train.evaluate import held_out_loss
    from danlu.train.log import read_log
    from danlu.train.parallel import shard

    tell_mix(context, prepared.train)
    compute = Compute.of(settings)
    if compute.world.is_main:
        _say_left_out(context, prepared)
    loaded = compute.ready(load(), settings, context)
    root = shard(loaded.root, compute.world)
    context.keep.mkdir(parents=True, exist_ok=True)
    if attach is not None:
        prepared = attach(prepared, compute, root)
    objective = objective or Language()
    measure: Evaluate | None = None
    if prepared.held_out is not None and evaluate is not None:
        measure = evaluate(prepared.held_out, compute)
    elif prepared.held_out is not None:
        held_out = prepared.held_out if noise is None else NoisyStore(prepared.held_out, noise)
        measure = held_out_loss(held_out, objective, compute.world, compute.micro_batch_tokens)
    loader = loader_of(prepared.train, settings, context.seed)
    drawn = loader if noise is None else Noisy(loader, noise, context.seed)
    trainer = train(context, settings, compute, root, objective, drawn, measure, sample=sampler(compute.world))
    if trained is not None:
        trained(root, prepared, compute)
    whole = loaded if compute.world.size == 1 else _gathered(loaded, load, compute.world)
    if whole is not None:
        finish(context, trainer, prepared, lambda folder: save(whole, folder))
    if not compute.world.is_main:
        return {}
    best = trainer.state.best_step if settings.load_best_model_at_end else None
    mixed = keep_mix(context, loader, trainer.state.step, read_log(context.work), best)
    return metrics_of(context, prepared, trainer, compute) | mixed


def _say_left_out(context: Context, prepared: Prepared) -> None:
    """Says which rows gave no example, and why, where there are any: a step may go on with far less than it was given."""
    ledger = json.loads((prepared.artifact.folder / "ledger.json").read_text(encoding="utf-8"))
    lost: dict[str, int] = {}
    unread = ledger["quarantined"]
    for station in ledger["stations"]:
        name = station["name"].removeprefix("eval: ")
        for reason, count in station["dropped"].items() if name in STATIONS else ():
            lost[reason] = lost.get(reason, 0) + count["rows"]
            unread -= count["rows"] if is_quarantined(name, reason) else 0
    told = [f"{rows:,} × {reason}" for reason, rows in {**lost, "not to be read": unread}.items() if rows > 0]
    if told:
        context.console.print(f"rows left out: {', '.join(told)}; {len(prepared.train):,} examples are left to train on",
                              style="yellow", markup=False)


@dataclass(frozen=True, slots=True)
class Compute:
    """Where and how precisely a step computes: its processes, its precision, and how many tokens at once."""

    world: "World"
    precision: str
    micro_batch_tokens: int

    @classmethod
    def of(cls, settings: Any, alone: bool = False) -> "Compute":
        """What the settings say, with everything `auto` decided. `alone`: this process, however many there are."""
        import torch

        from danlu.train.parallel import World, device_kind, has_bf16_units
        from danlu.train.trainer import DEFAULT_MICRO_BATCH_TOKENS

        wanted = None if settings.device == "auto" else settings.device
        world = World(device=torch.device(device_kind(wanted))) if alone else World.current(wanted)
        kind, precision = world.device.type, settings.precision
        if precision == "auto":
            precision = "fastest" if kind == "cuda" else "float32"
        if precision == "fastest":  # processes on several machines agree
            precision = "bf16" if all(world.gather(has_bf16_units(kind))) else "float32"
        return cls(world, precision, settings.micro_batch_tokens or DEFAULT_MICRO_BATCH_TOKENS[world.device.type])

    def ready(self, loaded: Any, settings: Any, context: Context, max_new_tokens: int = 0) -> Any:
        """A loaded model in this precision; what was found out about it is printed."""
        import torch

        from danlu.models.load import check_length
        from danlu.train.parallel import has_bf16_units

        check_length(loaded.lm.config, settings.cutoff_len, max_new_tokens)
        if self.precision == "bf16":
            loaded.root.autocast = torch.bfloat16
            if not has_bf16_units(self.world.device.type):
                context.console.print(EMULATED_BF16, markup=False)
        if settings.gradient_checkpointing:
            loaded.lm.gradient_checkpointing_enable()
        for note in loaded.notes:
            context.console.print(note, markup=False)
        return loaded


def train(context: Context, settings: Any, compute: Compute, root: Any, objective: "Objective | Coupled", loader: "Batches",
          evaluate: "Callable[[Any], Mapping[str, float]] | None", rate_scales: Mapping[str, float] = {},
          sample: "Sampler | None" = None) -> "Trainer":
    """Runs the trainer to its end under a progress bar."""
    from danlu.train.trainer import Trainer

    context.keep.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(root, objective, loader, settings, context.keep, compute.world, context.seed,
                      digest([context.fingerprint, compute.precision]), evaluate=evaluate, say=context.console.print,
                      rate_scales=rate_scales, sample=sample)
    with context.progress(f"training {context.step}", total=trainer.total_steps) as bar:
        for number, last in enumerate(trainer.fit()):
            if number == 0:
                bar.go_on(last.step - 1)  # what an interrupted training had done
            bar.update(last.step, loss=last.loss, tokens_per_second=last.num_tokens / max(last.seconds, 1e-9))
    return trainer


def finish(context: Context, trainer: "Trainer", prepared: Prepared, save: "Callable[[Path], None]") -> None:
    """Writes the work folder: the trained model, its log and curve, and the ledger of its examples."""
    if trainer.state.num_skipped == trainer.state.step:
        raise DataError("no step of this training had a finite loss and gradient; nothing was learned or saved",
                        hint="Lower learning_rate, or look at the data with `danlu inspect`.")
    fresh_folder(context.work)  # without what an interrupted saving left
    save(context.work)
    for name in ("trainer_log.jsonl", "timings.jsonl", "samples.jsonl", "training_loss.png"):
        if (context.keep / name).exists():
            shutil.copyfile(context.keep / name, context.work / name)
    for name in ("ledger.json", "quarantine.jsonl"):
        if (prepared.artifact.folder / name).exists():
            shutil.copyfile(prepared.artifact.folder / name, context.work / name)


def _gathered(loaded: Any, load: "Callable[[], Any]", world: "World") -> Any | None:
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


def metrics_of(context: Context, prepared: Prepared, trainer: "Trainer", compute: Compute) -> dict[str, Any]:
    """What the manifest says of a training: how much, from which loss to which, and on what machine."""
    text = (context.work / "trainer_log.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    evals = [line["eval_loss"] for line in lines if line.get("eval_loss") is not None]
    state = trainer.state
    metrics = {"steps": state.step, "tokens": state.num_input_tokens_seen, "train_loss": losses[-1], **_told(lines),
               "num_examples": len(prepared.train), "num_targets": prepared.train.num_targets,
               "examples": prepared.artifact.folder.name, "skipped_steps": state.num_skipped}
    if prepared.reference:
        metrics["reference"] = prepared.reference
    if evals:  # of the saved weights, which may be those of an earlier step
        best = trainer.settings.load_best_model_at_end and state.best_metric is not None
        metrics |= {"eval_loss_before": evals[0], "eval_loss": state.best_metric if best else evals[-1],
                    "best_eval_loss": min(evals[1:], default=evals[0])}
    return metrics | {"device": compute.world.device.type, "precision": compute.precision,
                      "processes": compute.world.size}


def _told(lines: list[dict[str, Any]]) -> dict[str, float]:
    """What says more than a loss: held-out accuracy or reward where there is an evaluation, else the first and the last
    rollout's, or the accuracy over the last tenth of the steps."""
    found: dict[str, float] = {}
    for name, key in (("eval_accuracy", "eval_accuracy"), ("eval_accuracy", "eval_rewards/accuracies"),
                      ("eval_reward", "eval_reward"), ("eval_kl", "eval_kl")):
        values = [line[key] for line in lines if key in line]
        if values:
            found |= {f"{name}_before": values[0], name: values[-1]} if name != "eval_kl" else {name: values[-1]}
    for name in ("reward", "kl"):
        values = [line[f"rollout/{name}"] for line in lines if f"rollout/{name}" in line]
        if values:
            found |= {f"first_rollout_{name}": values[0], f"last_rollout_{name}": values[-1]}
    accuracies = [line[key] for line in lines for key in ("accuracy", "rewards/accuracies") if line.get(key) is not None]
    if accuracies and "eval_accuracy" not in found:
        last = accuracies[-max(1, len(accuracies) // 10):]
        found["train_accuracy"] = sum(last) / len(last)
    return found


def all_texts(settings: DataConfig) -> Iterable[tuple[tuple[str | int, ...], str]]:
    """Each dataset with its key, for references."""
    for key, value, texts in (("dataset", settings.dataset, settings.datasets()),
                              ("eval_dataset", settings.eval_dataset, settings.eval_datasets())):
        for number, text in enumerate(texts):
            yield ((key,) if isinstance(value, str) else (key, number)), text


def forecast_training(settings: Any, inputs: Mapping[str, Input], config: Any, *, share_learned: float,
                      task_tokens: float, mean_length: float, shares_read: tuple[float, float] = (1.0, 1.0)) -> Forecast:
    """Tokens, steps, arithmetic, memory and time of a training, from sizes on disk where nothing has been tokenised.

    shares_read  of the tokens, by an encoder and by a decoder

    The fact `forward_share` is what one forward pass costs beside a training step: a third where every weight is trained.
    """
    from danlu.models.flops import size_of
    from danlu.train.parallel import device_kind, has_bf16_units
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
    size = size_of(config, shares_read)
    flops = size.training_flops(trained, trained * share_learned, mean_length, settings)
    forward = size.forward_flops(trained, trained * share_learned, mean_length) / flops
    kind = device_kind(None if settings.device == "auto" else settings.device)
    at_once = int(min(settings.micro_batch_tokens or DEFAULT_MICRO_BATCH_TOKENS[kind], per_step))
    share = min(1.0, size.trained_parameters(settings) / size.parameters)
    memory = size.training_bytes(at_once, share)
    trained_share = f", {100 * share:.2g} % of them trained" if share < 1 else ""
    notes.append(f"{size.parameters / 1e6:.1f} M parameters{trained_share}")
    if kind == "cuda":
        notes.append("the time on a GPU is not forecast")
    elif settings.precision in ("bf16", "fastest") and has_bf16_units(kind):
        notes.append("the time is that of float32; this processor is faster in bf16")
    emulated = kind == "cpu" and settings.precision == "bf16" and not has_bf16_units(kind)
    if emulated:
        notes.append(EMULATED_BF16)
    work = flops + size.slow_flops(trained, settings)
    seconds = Amount(work / (machine_flops() * ASSUMED_EFFICIENCY), False) if kind == "cpu" and not emulated else None
    return Forecast(Amount(trained, False), Amount(steps, exact), Amount(flops, False), Amount(memory, False), seconds,
                    notes, {"parameters": size.parameters, "config": config, "forward_share": forward})


def machine_flops() -> float:
    """Operations per second of a float32 matrix product on this machine, measured for a few hundredths of a second."""
    a = np.ones((1024, 1024), np.float32)
    best = float("inf")
    for _ in range(PEAK_TRIALS):
        begin = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begin)
    return 2 * 1024**3 / best
