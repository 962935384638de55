"""Plans: what a run would do, step by step, with every number resolved and a reason for each step; nothing is written.

A step's fingerprint is a pure function of the recipe and of the files outside it, so all fingerprints are known before
anything runs. What is there under a step's fingerprint is reused; otherwise the plan compares with the artifact that
the step's `current` names, and says which settings, inputs or files have changed.

    plan(Recipe.load("recipes/quickstart.yaml")).render()
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danlu.core.artifact import Artifact, digest, open_artifact, read_manifest
from danlu.core.errors import ConfigError, DataError
from danlu.pipeline.context import FILES, STEP, Forecast, Input
from danlu.pipeline.inputs import Contents, outside_input
from danlu.pipeline.recipe import CURRENT, Recipe, Step

if TYPE_CHECKING:
    from rich.console import Console

SHORT = 8  # characters of a fingerprint in a folder's name
MAX_CHANGES = 4  # named in one reason


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step as it would run.

    fingerprint  of the artifact that the step now means
    folder       where that artifact is or will be
    artifact     the artifact, when it is there already: then the step is reused
    reason       why it runs or is reused
    config       what the manifest will say of the settings and inputs
    """

    step: Step
    fingerprint: str
    folder: Path
    artifact: Artifact | None
    reason: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Input]
    forecast: Forecast

    @property
    def work(self) -> Path:
        """Where the step works until its artifact is published."""
        return self.folder.parent / f".work-{self.folder.name}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What running a recipe would do."""

    recipe: Recipe
    folder: Path  # runs/<recipe>
    steps: Mapping[str, PlannedStep]
    contents: Contents = field(default_factory=Contents)

    def render(self, console: "Console | None" = None, accounts: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Prints the plan as a table, with ≈ before numbers that depend on steps that have not run.

        accounts  by step what its mix will take, where that is known to the token (`danlu.data.shares`)
        """
        from danlu.pipeline.tables import plan_tables

        if console is None:
            from rich.console import Console

            console = Console()
        for table in plan_tables(self, accounts or {}):
            console.print(table)


def plan(recipe: Recipe, runs: str | Path = "runs") -> Plan:
    """Resolves everything about a recipe. Raises ConfigError where steps do not fit together, DataError where an
    artifact that a step means is there but damaged."""
    contents = Contents()
    folder = Path(runs) / recipe.name
    steps: dict[str, PlannedStep] = {}
    for step in recipe.steps.values():
        steps[step.name] = _plan_step(recipe, step, folder / step.name, steps, contents)
    return Plan(recipe, folder, steps, contents)


def _plan_step(recipe: Recipe, step: Step, folder: Path, earlier: Mapping[str, PlannedStep],
               contents: Contents) -> PlannedStep:
    inputs: dict[str, Input] = {}
    files: dict[str, dict[str, str]] = {}
    for reference in step.references:
        meaning = step.meanings[reference.text]
        if meaning.kind == STEP:
            inputs[reference.text] = input_of(earlier[meaning.step], earlier[meaning.step].artifact)
        elif reference.text not in inputs:
            inputs[reference.text], files[reference.text] = outside_input(recipe, step, reference, contents)
    config = describe(recipe, step, inputs, files)
    fingerprint = fingerprint_of(step, config)
    final = folder / fingerprint[:SHORT]
    artifact = find_artifact(final, step, fingerprint)
    check(recipe, step, inputs)
    forecast = step.module.forecast(step.settings, inputs)
    return PlannedStep(step, fingerprint, final, artifact, _reason(step, final, artifact, config), config, inputs,
                       forecast)


def input_of(planned: PlannedStep, artifact: Artifact | None) -> Input:
    """A step as the input of a later one."""
    return Input(planned.step.name, STEP, planned.fingerprint, planned.step.module.KIND,
                 artifact.folder if artifact else None, artifact, (), planned.step.stage, planned.step.settings,
                 planned.forecast)


def check(recipe: Recipe, step: Step, inputs: Mapping[str, Input]) -> None:
    """Asks the stage whether its inputs fit together and to its settings, where the stage has something to check."""
    fits = vars(step.module).get("check")
    if fits is not None:
        try:
            fits(step.settings, inputs)
        except ConfigError as error:
            where = error.where or recipe.source.place(("steps", step.name, *error.key.split(".")))
            raise ConfigError(error.message, where=where, hint=error.hint) from None


def describe(recipe: Recipe, step: Step, inputs: Mapping[str, Input],
             files: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """What a manifest says of how its artifact was made: all that decides the result, then the settings that do not."""
    settings = step.settings.result_settings()
    everything = step.settings.model_dump(mode="json")
    return {
        "stage": step.stage,
        "schema": step.module.SCHEMA,
        "seed": recipe.seed,
        "settings": settings,
        "free": {name: value for name, value in everything.items() if name not in settings},
        "inputs": [{"key": list(reference.key), "text": reference.text, "kind": inputs[reference.text].kind,
                    "fingerprint": inputs[reference.text].fingerprint, "files": dict(files.get(reference.text, {}))}
                   for reference in step.references],
    }


def fingerprint_of(step: Step, config: Mapping[str, Any]) -> str:
    """The hash of everything that decides the result: of steps and paths what is behind them, not their names.

    Only where a path as it is written goes into the records themselves it counts too.
    """
    settings = _copy(config["settings"])
    labels = {reference.key for reference in step.references if reference.label}
    for item in config["inputs"]:
        if not (tuple(item["key"]) in labels and item["kind"] == FILES):
            _blank(settings, item["key"], item["text"])
    inputs = [[item["key"], item["fingerprint"]] for item in config["inputs"]]
    return digest({"stage": step.stage, "schema": config["schema"], "seed": config["seed"], "settings": settings,
                   "inputs": inputs})


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _blank(settings: Any, key: list[str | int], text: str) -> None:
    """Takes a reference's text out of the settings, where it stands there as it was written."""
    for part in key[:-1]:
        inside = isinstance(settings, dict) and part in settings
        inside = inside or (isinstance(settings, list) and isinstance(part, int) and part < len(settings))
        if not inside:
            return
        settings = settings[part]
    last = key[-1]
    if isinstance(settings, dict) and settings.get(str(last)) == text:
        settings[str(last)] = ""
    elif isinstance(settings, list) and isinstance(last, int) and last < len(settings) and settings[last] == text:
        settings[last] = ""


def find_artifact(final: Path, step: Step, fingerprint: str) -> Artifact | None:
    """The artifact at its place, verified; None where there is nothing.

    Raises DataError where something is there that is not that artifact whole: it is never silently made anew.
    """
    if not final.exists():
        return None
    artifact = open_artifact(final, kind=step.module.KIND)
    if artifact.fingerprint != fingerprint:
        raise DataError(f"holds the artifact {artifact.fingerprint[:16]}…, not {fingerprint[:16]}…", where=str(final),
                        hint="Move that folder away and run the recipe again.")
    return artifact


def _reason(step: Step, final: Path, artifact: Artifact | None, config: Mapping[str, Any]) -> str:
    """Why a step runs or is reused, in words."""
    pointer = final.parent / CURRENT
    named = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""
    if artifact is not None:
        return "nothing has changed" if named == final.name else "made before with these very settings"
    if (final.parent / f".work-{final.name}").exists():
        resumes = vars(step.module).get("RESUMES", False)
        return "was interrupted; goes on where it was" if resumes else "was interrupted; starts again"
    if not named:
        return "has not run yet"
    try:
        manifest = read_manifest(final.parent / named)
    except DataError:
        return f"the earlier artifact ({named}) is gone or damaged"
    changes = list_changes(manifest["config"], config)
    more = f" and {len(changes) - MAX_CHANGES} more" if len(changes) > MAX_CHANGES else ""
    return "; ".join(changes[:MAX_CHANGES]) + more if changes else f"the earlier artifact ({named}) is another"


def changed_settings(recipe: Recipe, step: Step, old: Mapping[str, Any]) -> list[str]:
    """What differs between how an artifact was made and what the recipe says now, but for the content of its inputs."""
    return list_changes(old, {"stage": step.stage, "schema": step.module.SCHEMA, "seed": recipe.seed,
                              "settings": step.settings.result_settings(), "inputs": []})


def list_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions of a step, in words."""
    changes = []
    if old["stage"] != new["stage"]:
        return [f"its stage was {old['stage']}"]
    if old["schema"] != new["schema"]:
        changes.append(f"the stage {new['stage']} itself has changed (version {old['schema']} → {new['schema']})")
    if old["seed"] != new["seed"]:
        changes.append(f"seed {old['seed']} → {new['seed']}")
    before = {tuple(item["key"]): item for item in old["inputs"]}
    after = {tuple(item["key"]): item for item in new["inputs"]}
    blanked_old, blanked_new = _copy(old["settings"]), _copy(new["settings"])
    for key in before.keys() & after.keys():
        _blank(blanked_old, list(key), before[key]["text"])
        _blank(blanked_new, list(key), after[key]["text"])
    for path, left, right in _differences(blanked_old, blanked_new, ()):
        changes.append(f"{'.'.join(map(str, path))} {_show(left)} → {_show(right)}")
    for key, item in after.items():
        if key in before and before[key]["fingerprint"] != item["fingerprint"]:
            changes.append(_input_change(before[key], item))
    return changes


def _input_change(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """How an input has changed: another text, another parent, or other files."""
    if old["text"] != new["text"]:
        return f"reads “{new['text']}” instead of “{old['text']}”"
    if new["kind"] == STEP:
        return f"its input “{new['text']}” has changed"
    names = [f"{name} changed" for name in new["files"] if old["files"].get(name, new["files"][name]) !=
             new["files"][name]]
    names += [f"{name} is new" for name in new["files"] if name not in old["files"]]
    names += [f"{name} is gone" for name in old["files"] if name not in new["files"]]
    if not (new["files"] and old["files"] and names):
        return f"the content of “{new['text']}” has changed"
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"“{new['text']}”: {', '.join(names[:3])}{more}"


_MISSING = object()


def _differences(old: Any, new: Any, path: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], Any, Any]]:
    """Each place where two trees of plain values differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*new, *(key for key in old if key not in new)]
        return [item for key in keys
                for item in _differences(old.get(key, _MISSING), new.get(key, _MISSING), (*path, key))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [item for index, (left, right) in enumerate(zip(old, new))
                for item in _differences(left, right, (*path, index))]
    return [] if old == new and type(old) is type(new) else [(path, old, new)]


def _show(value: Any) -> str:
    text = "nothing" if value is _MISSING or value is None else str(value)
    return text if len(text) <= 40 else text[:39] + "…"
