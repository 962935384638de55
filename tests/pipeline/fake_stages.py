"""Three tiny stages for the tests of the pipeline: `words` leaves a corpus, `count` a model, `note` a report.

    register(STAGES)      # {"words": …, "count": …, "note": …} and nothing else
"""

import json
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from danlu.core.config import Config, free
from danlu.core.errors import ConfigError
from danlu.core.ledger import Ledger
from danlu.pipeline.context import DOCSTRINGS, FILES, HUB, TASK, Amount, Context, Forecast, Input, Reference

RAN: list[str] = []  # the steps that ran, in order


class WordsSettings(Config):
    dataset: list[str]
    upper: bool = False
    save_steps: int = free(10)


class CountSettings(Config):
    dataset: str
    model: str | None = None
    learning_rate: float = Field(1e-3, gt=0, description="How far one step goes.")
    max_steps: int = 3
    pause: float = free(0.0)
    mark: str = free("")


class NoteSettings(Config):
    model: str
    fill: int = 0


def words_references(settings: WordsSettings) -> list[Reference]:
    return [Reference(("dataset", i), text, (FILES, DOCSTRINGS, TASK)) for i, text in enumerate(settings.dataset)]


def words_forecast(settings: WordsSettings, inputs: Mapping[str, Input]) -> Forecast:
    size = sum(path.stat().st_size for found in inputs.values() for path in found.files)
    return Forecast(tokens=Amount(size), facts={"vocab_size": 7})


def words_run(context: Context) -> dict:
    RAN.append(context.step)
    ledger = Ledger()
    station = ledger.station("read")
    out = []
    for text, found in context.inputs.items():
        for path in found.files:
            for number, line in enumerate(path.read_text().splitlines(), 1):
                station.take(rows=1, bytes=len(line))
                if "bad" in line:
                    station.drop("bad word", rows=1, bytes=len(line))
                    ledger.quarantine(f"{text}:{number}", "bad word", line)
                    continue
                station.give(rows=1, bytes=len(line))
                out.append(line.upper() if context.settings.upper else line)
    (context.work / "words.txt").write_text("\n".join(out))
    ledger.save(context.work)
    return {"num_lines": len(out)}


def count_references(settings: CountSettings) -> list[Reference]:
    found = [Reference(("dataset",), settings.dataset, ("corpus",))]
    if settings.model is not None:
        found.append(Reference(("model",), settings.model, ("model", FILES, HUB)))
    return found


def count_forecast(settings: CountSettings, inputs: Mapping[str, Input]) -> Forecast:
    corpus = inputs[settings.dataset]
    tokens = corpus.forecast.tokens.value if corpus.forecast and corpus.forecast.tokens else 0
    exact = corpus.artifact is not None
    return Forecast(tokens=Amount(tokens * settings.max_steps, exact), steps=Amount(settings.max_steps),
                    flops=Amount(6e9, exact), memory=Amount(2.5e9), seconds=Amount(90, False), notes=("a note",))


def count_check(settings: CountSettings, inputs: Mapping[str, Input]) -> None:
    if settings.max_steps == 13:
        raise ConfigError("13 steps do not fit")


def count_run(context: Context) -> dict:
    """Leaves a file per step; goes on from those that are there."""
    RAN.append(context.step)
    settings = context.settings
    data = (context.inputs[settings.dataset].require_folder() / "words.txt").read_text()
    done = len(list(context.work.glob("step-*")))
    with context.progress("counting", total=settings.max_steps) as bar:
        for step in range(done, settings.max_steps):
            (context.work / f"step-{step}").write_text(data)
            bar.update(step + 1, loss=1 / (step + 1))
            if settings.mark:
                Path(settings.mark).write_text(str(step))
            time.sleep(settings.pause)
    return {"num_chars": len(data), "loss": 0.25, "resumed_at": done}


def note_references(settings: NoteSettings) -> list[Reference]:
    return [Reference(("model",), settings.model, ("model",))]


def note_forecast(settings: NoteSettings, inputs: Mapping[str, Input]) -> Forecast:
    return Forecast()


def note_run(context: Context) -> dict:
    RAN.append(context.step)
    (context.work / "note.json").write_text(json.dumps(sorted(context.inputs)) + " " * context.settings.fill)
    return {}


def register(stages: dict[str, str]) -> None:
    """Makes these the only stages."""
    here = globals()
    kinds = {"words": "corpus", "count": "model", "note": "report"}
    stages.clear()
    for name, kind in kinds.items():
        module = types.ModuleType(f"fake_stage_{name}")
        module.KIND, module.SCHEMA = kind, 1
        module.Settings = here[f"{name.capitalize()}Settings"]
        module.references, module.forecast = here[f"{name}_references"], here[f"{name}_forecast"]
        module.run = here[f"{name}_run"]
        if name == "count":
            module.check, module.RESUMES = count_check, True
        sys.modules[module.__name__] = module
        stages[name] = module.__name__
