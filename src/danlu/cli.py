"""The command line. Commands are thin: they read arguments, call the pipeline and print.

Everything heavy is imported inside the commands, so that help appears at once. An error for people is printed in one
message, without a traceback, and the process ends with code 2; Ctrl-C ends it with 130.
"""

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from danlu import __version__
from danlu.core.errors import ConfigError, DanluError
from danlu.core.terminal import visible

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 140
EXIT_DAMAGED, EXIT_STOPPED = 1, 130


class Commands(typer.core.TyperGroup):
    """All commands, with the project's way of ending: errors in red on stderr, Ctrl-C without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DanluError as error:
            _print_error(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            _errors().print("Stopped. Nothing half-written was published; the same command goes on from here.",
                            style="yellow")
            raise typer.Exit(EXIT_STOPPED) from None
        except BrokenPipeError:  # `danlu … | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(EXIT_DAMAGED) from None


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]},
                  help="danlu (丹炉): from raw text to a chat model, in one recipe.\n\n"
                       "Begin with [bold]danlu plan recipes/quickstart.yaml[/], then [bold]danlu run[/] the same.")

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder (runs/NAME), or one artifact's.")]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="The folder that holds all runs.")]
Overrides = Annotated[list[str] | None, typer.Option(
    "--set", metavar="PATH=VALUE", help="Change one value, e.g. steps.base.learning_rate=1e-3; may be repeated.")]


def _errors() -> "Console":
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def _console() -> "Console":
    """The console; where the output is no terminal its tables are not cut at 80 characters."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=PIPE_WIDTH)


def _print_error(error: DanluError) -> None:
    """Prints an error. Under torchrun the main process speaks first; the others speak only if it does not fail too."""
    from rich.text import Text

    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        from danlu.pipeline.run import Stopped

        if isinstance(error, Stopped):
            return
        time.sleep(2)  # where the main process fails as well, this one is ended meanwhile
    said = f"process {rank}: {error}" if rank else str(error)
    _errors().print(Text(visible(said), style="red"))


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"danlu {__version__}")
        raise typer.Exit()


@app.callback()
def danlu(version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True,
                                                help="Show danlu's version.")] = False) -> None:
    """Options of danlu itself."""


@app.command("run")
def run_command(recipe: RecipePath, overrides: Overrides = None,
                only: Annotated[list[str] | None, typer.Option(
                    "--only", metavar="STEP", help="Run only this step; may be repeated.")] = None,
                runs: Runs = Path("runs")) -> None:
    """Run a recipe: make what is missing, reuse what is there.

    A stopped run goes on when the same command is given again.

    [bold]Example:[/] danlu run recipes/quickstart.yaml --set steps.base.max_steps=100
    """
    from danlu.pipeline.recipe import Recipe
    from danlu.pipeline.run import run

    run(Recipe.load(recipe, overrides or ()), runs, only or None, _console())


@app.command("plan")
def plan_command(recipe: RecipePath, overrides: Overrides = None, runs: Runs = Path("runs")) -> None:
    """Show what a run would do, why, and what it would take. Nothing is trained or written.

    [bold]Example:[/] danlu plan recipes/quickstart.yaml
    """
    from danlu.pipeline.inspect import accounts_beforehand
    from danlu.pipeline.plan import plan
    from danlu.pipeline.recipe import Recipe

    found = plan(Recipe.load(recipe, overrides or ()), runs)
    console = _console()
    found.render(console, accounts_beforehand(found, console))


@app.command()
def inspect(recipe: RecipePath, step: Annotated[str, typer.Argument(metavar="STEP", help="A step of the recipe.")],
            overrides: Overrides = None, runs: Runs = Path("runs"),
            number: Annotated[int, typer.Option("--number", "-n", min=1, help="How many examples to show.")] = 3,
            at: Annotated[int, typer.Option("--at", min=0, help="Of which optimizer step (ppo: rollout), from 0.")]
            = 0,
            model: Annotated[str | None, typer.Option(help="A model's step or folder: adds −log₂ p of every token.")]
            = None) -> None:
    """Show what a step trains on, token by token, exactly as the trainer would get it.

    [bold]Example:[/] danlu inspect recipes/quickstart.yaml chat --model runs/quickstart/chat
    """
    from danlu.pipeline.inspect import inspect_step
    from danlu.pipeline.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or ())
    inspect_step(loaded, step, _console(), runs=runs, number=number, at=at, model=model)


@app.command()
def check(recipe: RecipePath,
          step: Annotated[str | None, typer.Argument(metavar="STEP", help="A step; default: all that train.")] = None,
          overrides: Overrides = None, runs: Runs = Path("runs"),
          number: Annotated[int, typer.Option("--number", "-n", min=0, help="How many examples to show.")] = 3,
          html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write the same as a page.")] = None
          ) -> None:
    """Look at all rows of a step's data before training on them. Ends with code 1 if there are errors.

    [bold]Example:[/] danlu check recipes/quickstart.yaml chat --html check.html
    """
    from danlu.pipeline.check import check_recipe
    from danlu.pipeline.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or ())
    if not check_recipe(loaded, [step] if step else [], _console(), runs=runs, number=number, html=html):
        raise typer.Exit(EXIT_DAMAGED)


@app.command()
def corpus(recipe: RecipePath, step: Annotated[str, typer.Argument(metavar="STEP", help="A step of stage corpus.")],
           overrides: Overrides = None, runs: Runs = Path("runs"),
           report: Annotated[bool, typer.Option("--report", help="Only show the report again.")] = False) -> None:
    """Make one corpus of a recipe and show its report: counts, lengths, languages, what each rule removed.

    [bold]Example:[/] danlu corpus recipes/quickstart.yaml corpus --report
    """
    from danlu.pipeline.corpus_report import show_report
    from danlu.pipeline.recipe import Recipe
    from danlu.pipeline.run import run as run_recipe

    loaded = Recipe.load(recipe, overrides or ())
    if not report:
        run_recipe(loaded, runs, [step], _console())
    show_report(loaded, step, _console(), runs)


@app.command()
def ledger(run: RunFolder) -> None:
    """Show the ledger of a run: what came in, what was dropped and why, what went out, at every station.

    [bold]Example:[/] danlu ledger runs/quickstart
    """
    from danlu.pipeline.tables import ledger_table, quarantine_table
    from danlu.pipeline.upkeep import current_artifacts, read_ledger

    console = _console()
    found = [kept for kept in map(read_ledger, current_artifacts(run)) if kept is not None]
    if not found:
        raise ConfigError("no artifact here keeps a ledger", where=str(run))
    for kept in found:
        console.print(ledger_table(kept.name, kept.stations))
        if kept.quarantine:
            console.print(quarantine_table(kept.quarantine))


@app.command()
def verify(run: RunFolder) -> None:
    """Hash every byte of every artifact and checkpoint below a folder. Ends with code 1 if any is damaged.

    [bold]Example:[/] danlu verify runs/quickstart
    """
    from rich.text import Text

    from danlu.pipeline.upkeep import unfinished
    from danlu.pipeline.upkeep import verify as verify_all

    console = _console()
    num_found = num_damaged = 0
    for found in verify_all(run):
        num_found += 1
        num_damaged += bool(found.problem)
        word, said = ("DAMAGED", found.problem) if found.problem else ("OK", f"{found.folder} ({found.kind})")
        console.print(Text(word.ljust(8), style="red" if found.problem else "green") + Text(visible(said), style="default"),
                      soft_wrap=True)
    for folder in unfinished(run):
        console.print(Text(visible(f"{'…':8}{folder} is unfinished work")), soft_wrap=True)
    if not num_found:
        raise ConfigError("holds no artifact", where=str(run))
    console.print(f"{num_found - num_damaged} of {num_found} verified.", highlight=False)
    if num_damaged:
        raise typer.Exit(EXIT_DAMAGED)


@app.command()
def clean(run: RunFolder, yes: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False) -> None:
    """List what the recipe no longer means (older artifacts, stopped work), and remove it if you say so.

    [bold]Example:[/] danlu clean runs/quickstart --yes
    """
    from rich.text import Text

    from danlu.pipeline.lock import hold
    from danlu.pipeline.tables import show_bytes
    from danlu.pipeline.upkeep import leftovers, remove, require_run, run_of

    require_run(run)
    console = _console()
    if not leftovers(run):  # without a lock, which would be a file of ours in whatever folder this is
        console.print("Nothing to remove.")
        return
    with hold(run_of(run)):
        found = leftovers(run)
        for item in found:
            console.print(Text(visible(f"{show_bytes(item.num_bytes):>10}  {item.folder}  ({item.why})")),
                          soft_wrap=True)
        console.print(f"{len(found)} folders, {show_bytes(sum(item.num_bytes for item in found))}.", highlight=False)
        if not yes and not sys.stdin.isatty():
            console.print("Nothing was removed; add --yes to remove them.")
        elif yes or typer.confirm("Remove them?"):
            for item in found:
                remove(item)
            console.print("Removed.")


def _share(value: float) -> float:
    if not 0 < value <= 1:
        raise typer.BadParameter("it must be above 0 and at most 1.")
    return value


def _temperature(value: float) -> float:
    if not 0 <= value < float("inf"):
        raise typer.BadParameter("it must be 0 or a finite number above.")
    return value


@app.command()
def chat(model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model: runs/NAME/STEP, or any model folder.")],
         system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
         temperature: Annotated[float, typer.Option(callback=_temperature, help="0 always takes the likeliest token.")]
         = 0.7,
         top_p: Annotated[float, typer.Option(callback=_share, help="Sample from this share of the mass, above 0.")]
         = 0.9,
         max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 256,
         seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same answers.")] = 0) -> None:
    """Chat with a model in the terminal; with a pipe as input, each line is one message.

    [bold]Example:[/] danlu chat runs/quickstart/chat
    """
    from danlu.pipeline.recipe import read_local
    from danlu.pipeline.upkeep import require_run
    from danlu.serve.chat import chat as start

    require_run(model)
    folder = read_local(model).path or model
    start(folder, _console(), temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, system=system,
          seed=seed)


@app.command()
def score(model: Annotated[str, typer.Argument(metavar="MODEL", help="A reward model or a classifier: runs/NAME/STEP.")],
          file: Annotated[str, typer.Argument(metavar="FILE", help="Prompts with answers, pairs, rankings; or texts.")],
          out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the scores there, as JSON lines.")]
          = None,
          micro_batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens that are computed at once.")] = 8192) -> None:
    """Score answers with a reward model, the best first, or predict the classes of texts with a classifier.

    [bold]Example:[/] danlu score runs/quickstart/judge pairs.jsonl --out scores.jsonl
    """
    from danlu.pipeline.score import score_file

    score_file(model, file, _console(), out, micro_batch_tokens=micro_batch_tokens)


Model = Annotated[str, typer.Option("--model", metavar="MODEL", help="A model folder, a step's folder or a hub id.")]
Datasets = Annotated[list[str], typer.Option("--dataset", metavar="PATH", help="A file or folder; may be repeated.")]
Name = Annotated[str | None, typer.Option(
    "--name", metavar="NAME", help="The run's name; default: the dataset's, for rm, dpo and ppo with the stage.")]
StepOverrides = Annotated[list[str] | None, typer.Option(
    "--set", metavar="KEY=VALUE", help="A setting of the stage, e.g. learning_rate=1e-4; may be repeated.")]


@app.command("pt")
def pt_command(model: Model, dataset: Datasets, name: Name = None, runs: Runs = Path("runs"),
               overrides: StepOverrides = None) -> None:
    """Pre-train a model further on your own texts. The recipe that runs is written to runs/NAME/recipe.yaml.

    [bold]Example:[/] danlu pt --model runs/quickstart/base --dataset texts/ --set learning_rate=1e-4
    """
    _one_step("pt", {"model": model}, dataset, name, runs, overrides)


@app.command("sft")
def sft_command(model: Model, dataset: Datasets, name: Name = None, runs: Runs = Path("runs"),
                overrides: StepOverrides = None) -> None:
    """Fine-tune a model on your own dialogues. The recipe that runs is written to runs/NAME/recipe.yaml.

    [bold]Example:[/] danlu sft --model runs/quickstart/chat --dataset mine.jsonl --set num_train_epochs=3
    """
    _one_step("sft", {"model": model}, dataset, name, runs, overrides)


@app.command("rm")
def rm_command(model: Model, dataset: Datasets, name: Name = None, runs: Runs = Path("runs"),
               overrides: StepOverrides = None) -> None:
    """Train a reward model on your own preferences (chosen and rejected answers).

    [bold]Example:[/] danlu rm --model runs/quickstart/chat --dataset pairs.jsonl --set val_size=0.1
    """
    _one_step("rm", {"model": model}, dataset, name, runs, overrides)


@app.command("cls")
def cls_command(model: Model, dataset: Datasets, name: Name = None, runs: Runs = Path("runs"),
                overrides: StepOverrides = None) -> None:
    """Train a classifier on your own texts with labels (csv, tsv, JSON), or on pairs of texts.

    [bold]Example:[/] danlu cls --model runs/quickstart/base --dataset reviews.csv --set val_size=0.1
    """
    _one_step("cls", {"model": model}, dataset, name, runs, overrides)


@app.command("dpo")
def dpo_command(model: Model, dataset: Datasets, name: Name = None, runs: Runs = Path("runs"),
                overrides: StepOverrides = None) -> None:
    """Optimise a chat model on your own preferences directly; the reference is the model before training.

    [bold]Example:[/] danlu dpo --model runs/quickstart/chat --dataset pairs.jsonl --set pref_beta=0.1
    """
    _one_step("dpo", {"model": model}, dataset, name, runs, overrides)


@app.command("kto")
def kto_command(model: Model, dataset: Datasets, name: Name = None, runs: Runs = Path("runs"),
                overrides: StepOverrides = None) -> None:
    """Teach a chat model from single answers with a label, welcome or not; the reference is the model before training.

    [bold]Example:[/] danlu kto --model runs/quickstart/chat --dataset feedback.jsonl --set undesirable_weight=0.8
    """
    _one_step("kto", {"model": model}, dataset, name, runs, overrides)


@app.command("ppo")
def ppo_command(model: Model, dataset: Datasets,
                reward_model: Annotated[str, typer.Option("--reward-model", metavar="MODEL",
                                                          help="A reward model: a step's folder (stage rm), or any.")],
                name: Name = None, runs: Runs = Path("runs"), overrides: StepOverrides = None) -> None:
    """Let a chat model answer your prompts and learn from what a reward model says (PPO with a critic).

    [bold]Example:[/] danlu ppo --model runs/quickstart/chat --reward-model runs/quickstart/judge --dataset prompts.jsonl
    --set cutoff_len=512
    """
    _one_step("ppo", {"model": model, "reward_model": reward_model}, dataset, name, runs, overrides)


def _one_step(stage: str, models: dict[str, str], datasets: list[str], name: str | None, runs: Path,
              options: list[str] | None) -> None:
    from danlu.pipeline.onestep import default_name, write_recipe
    from danlu.pipeline.run import run

    path, recipe = write_recipe(stage, runs, name or default_name(datasets, stage), models, datasets, options or [])
    console = _console()
    console.print(visible(f"recipe: {path}"), highlight=False, markup=False)
    run(recipe, runs, console=console)


@app.command()
def export(model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model: runs/NAME/STEP, or any model folder.")],
           to: Annotated[Path, typer.Option("--to", metavar="FOLDER", help="The new folder to write.")],
           adapter: Annotated[Path | None, typer.Option(
               metavar="FOLDER", help="Adapters of this model (a step that trained some, or their folder), to merge in.")]
           = None,
           form: Annotated[Literal["safetensors", "gguf"], typer.Option("--format", help="Of transformers, or llama.cpp.")]
           = "safetensors",
           dtype: Annotated[Literal["float32", "bf16", "f16"], typer.Option(help="Precision of the weights.")] = "float32",
           max_shard_size: Annotated[str | None, typer.Option(metavar="SIZE", help="Of a safetensors file, e.g. 5GB.")]
           = None) -> None:
    """Write a model for other programs, open it again and compare. Nothing is left where it differs.

    [bold]Example:[/] danlu export runs/quickstart/chat --to chat-gguf --format gguf --dtype f16
    """
    from danlu.pipeline.export import export as write

    write(model, to, _console(), adapter=adapter, form=form, dtype=dtype, max_shard_size=max_shard_size)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors that complete and check YAML.

    [bold]Example:[/] danlu schema > recipe.schema.json
    """
    import json

    from danlu.pipeline.schema import recipe_schema

    typer.echo(json.dumps(recipe_schema(), ensure_ascii=False, indent=1))


def main() -> None:
    """The entry point of the command `danlu`."""
    # Large pages for torch's memory on CPUs, read at its first allocation: training is up to a third faster (docs/log.md).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        app()
    except SystemExit as ending:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # gloo's threads may outlive their owners while the interpreter is taken down, which would end a process that
            # has done all its work with SIGABRT. Everything is on the disk and the other processes were told.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ending.code if isinstance(ending.code, int) else int(ending.code is not None))
        raise


if __name__ == "__main__":
    main()
