"""A training run as one value: what a plan, a search for one and the command line take."""

import dataclasses
import difflib
import importlib
import importlib.machinery
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from zerojax.errors import RecipeError

DEFAULT = "recipe"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is trained, on what, by which optimizer; not how it is laid out.

    Args:
      init_fn: takes nothing and returns the model, as for `Zero.init`: `lambda: model.init(jax.random.key(0), x)`.
      loss_fn: as for `Zero.train_step`; or a dict of such by a name of your own for how each rematerialises, as
        `{"none": loss, "block": loss_with_remat}`, which `advise` tries all.
      tx: an optax transform.
      batch: arrays or `ShapeDtypeStruct`s of a whole batch, over all devices and microbatches; or a function of the number of
        devices and microbatches together that makes them, for batches that grow with the cluster.
      trainable: which parameters are trained, as for `Zero.init`; None is all.

    Raises:
      RecipeError: one of these that is not what it has to be.

    >>> import jax, optax
    >>> recipe = Recipe(lambda: {"w": jax.numpy.ones(4)}, lambda p, x: (x @ p["w"]).mean(), optax.sgd(0.1),
    ...                 lambda parts: jax.ShapeDtypeStruct((parts, 4), "float32"))
    >>> recipe.rows(8).shape
    (8, 4)
    """

    init_fn: Callable
    loss_fn: Callable | Mapping[str, Callable]
    tx: Any
    batch: Any
    trainable: Any = None

    def __post_init__(self):
        if not callable(self.init_fn):
            raise RecipeError(f"Recipe(init_fn={self.init_fn!r}): write a function of no arguments that returns the model.")
        if needed := _needs(self.init_fn):
            raise RecipeError(f"Recipe(init_fn=...) takes {needed}; write a function of no arguments: "
                              "lambda: model.init(jax.random.key(0), x).")
        if not self.losses or not all(callable(f) for f in self.losses.values()):
            raise RecipeError(f"Recipe(loss_fn={self.loss_fn!r}): write a function, or a dict of names to functions.")
        if not (hasattr(self.tx, "init") and hasattr(self.tx, "update")):
            raise RecipeError(f"Recipe(tx={self.tx!r}): write an optax transform, as optax.adamw(1e-3).")

    @property
    def losses(self) -> dict[str, Callable]:
        """By the name of how each rematerialises; "" for a single one."""
        return dict(self.loss_fn) if isinstance(self.loss_fn, Mapping) else {"": self.loss_fn}

    def loss(self, name: str | None = None) -> Callable:
        """The loss of that name; the first, if none is named.

        Raises:
          RecipeError: no such name.
        """
        if name is None:
            return next(iter(self.losses.values()))
        if name not in self.losses:
            raise RecipeError(f"the recipe has no loss {name!r}; its losses are {', '.join(map(repr, self.losses))}.")
        return self.losses[name]

    def rows(self, parts: int) -> Any:
        """The batch's shapes, for so many devices x microbatches."""
        return self.batch(parts) if callable(self.batch) else self.batch


def _needs(fn: Callable) -> list[str]:
    """Names of the arguments that a function can't be called without."""
    try:
        given = inspect.signature(fn).parameters.items()
    except ValueError:  # of some builtins Python knows nothing
        return []
    return [n for n, p in given if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def load(where: str) -> Recipe:
    """The recipe of "file.py", "package.module", or of either with ":name".

    The file is imported, so that what is under `if __name__ == "__main__"` does not run.

    Raises:
      RecipeError: no such file, module or name, or one that is no `Recipe`.
    """
    place, _, name = where.rpartition(":") if ":" in where else (where, "", "")
    if not place or place.startswith("."):
        raise RecipeError(f"{where!r} names no file or module; write train.py, package.module, or either with :name.")
    module = _import(place)
    found = getattr(module, name or DEFAULT, None)
    if isinstance(found, Recipe):
        return found
    others = [n for n, v in vars(module).items() if isinstance(v, Recipe)]
    what = f"{name or DEFAULT} is a {type(found).__name__}" if found is not None else f"there is no {name or DEFAULT} in it"
    near = difflib.get_close_matches(name or DEFAULT, others, 1, 0.0)
    raise RecipeError(f"{where}: {what}; " + (f"did you mean {place}:{near[0]}?" if near else
                      "write recipe = zj.Recipe(init_fn, loss_fn, tx, batch) at its top level."))


def _import(place: str):
    path = pathlib.Path(place)
    if path.suffix == ".py" or path.is_file():
        return _execute(path)
    sys.path.insert(0, "")  # as `python -m` does
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise
        raise RecipeError(f"there is neither a file nor a module {place!r}; write a path, as train.py, or a module that Python "
                          "can import from here.") from None


def _execute(path: pathlib.Path):
    if not path.is_file():
        raise RecipeError(f"there is no file {str(path)!r}.")
    sys.path.insert(0, str(path.parent.resolve()))  # as `python file.py` does
    loader = importlib.machinery.SourceFileLoader(f"recipe_{path.stem}", str(path.resolve()))
    spec = importlib.util.spec_from_file_location(loader.name, path.resolve(), loader=loader)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{str(path)!r} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
