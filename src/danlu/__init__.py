"""danlu (丹炉): from raw text to a chat model, in one recipe.

    from danlu import Recipe, plan, run
    run(Recipe.load("recipes/quickstart.yaml"))
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "plan", "run"]

if TYPE_CHECKING:
    from danlu.pipeline.plan import plan
    from danlu.pipeline.recipe import Recipe
    from danlu.pipeline.run import run


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that `danlu --help` does not wait for what it does not need.
    if name == "Recipe":
        from danlu.pipeline.recipe import Recipe
        return Recipe
    if name == "plan":
        from danlu.pipeline.plan import plan
        return plan
    if name == "run":
        from danlu.pipeline.run import run
        return run
    raise AttributeError(f"module 'danlu' has no attribute {name!r}")
