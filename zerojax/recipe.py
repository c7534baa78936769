"""A training run as one value: the input of plans, of `advise` and of the `zerojax` command."""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from zerojax.errors import RecipeError

DEFAULT = "recipe"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The model, loss, optimizer and batch of a training run, without its layout.

    Args:
      init_fn: a function of no arguments that returns the model, as for `Zero.init`:
        `lambda: model.init(jax.random.key(0), x)`.
      loss_fn: a loss, as for `Zero.train_step`; or a dict of losses that differ in their
        rematerialization, by names of your choice, such as
        `{"none": loss, "block": loss_with_remat}`. `advise` tries each of them.
      tx: an optax transform.
      batch: arrays or `ShapeDtypeStruct`s of a whole batch, over all devices and microbatches; or,
        for a batch that grows with the cluster, a function that returns them for a given number of
        devices x microbatches.
      trainable: which parameters are trained, as for `Zero.init`; None means all.

    Raises:
      RecipeError: an argument is invalid.

    >>> import jax, optax
    >>> recipe = Recipe(lambda: {"w": jax.numpy.ones(4)}, lambda p, x: (x @ p["w"]).mean(),
    ...                 optax.sgd(0.1), lambda parts: jax.ShapeDtypeStruct((parts, 4), "float32"))
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
            raise RecipeError(f"Recipe was given a {type(self.init_fn).__name__} as its init_fn; "
                              "write a function of no arguments that returns the model, such as "
                              "lambda: model.init(jax.random.key(0), x).")
        if required := _required(self.init_fn):
            raise RecipeError(f"Recipe(init_fn=...) takes {required}; write a function of no "
                              "arguments, such as lambda: model.init(jax.random.key(0), x).")
        if not self.losses or not all(map(callable, self.losses.values())):
            raise RecipeError(f"Recipe was given a {type(self.loss_fn).__name__} as its loss_fn; "
                              "write a function, or a dict of names to functions.")
        if not (hasattr(self.tx, "init") and hasattr(self.tx, "update")):
            raise RecipeError(f"Recipe was given a {type(self.tx).__name__} as its tx; write an "
                              "optax transform, such as optax.adamw(1e-3).")

    @property
    def losses(self) -> dict[str, Callable]:
        """The losses by name; a single loss has the name ""."""
        return dict(self.loss_fn) if isinstance(self.loss_fn, Mapping) else {"": self.loss_fn}

    def loss(self, name: str | None = None) -> Callable:
        """Returns the loss with a name; the first loss if the name is None.

        Raises:
          RecipeError: there is no loss of this name.
        """
        if name is None:
            return next(iter(self.losses.values()))
        if name not in self.losses:
            names = ", ".join(map(repr, self.losses))
            raise RecipeError(f"the recipe has no loss {name!r}; its losses are {names}.")
        return self.losses[name]

    def rows(self, parts: int) -> Any:
        """Returns the batch, or its shapes, for `parts` = devices x microbatches."""
        return self.batch(parts) if callable(self.batch) else self.batch


def _required(fn: Callable) -> list[str]:
    """Returns the names of the positional arguments that have no default."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except ValueError:  # some builtins have no signature
        return []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind in positional]


def load(where: str) -> Recipe:
    """Returns the recipe in "file.py" or "package.module", or in either with ":name" appended.

    The file is imported, so the code under `if __name__ == "__main__"` does not run. During the
    import, `sys.path` starts with `folder(where)`; afterwards that entry is removed. A function of
    the recipe that imports a neighbouring file only when it is called needs the entry again.
    The module stays in `sys.modules`, because dataclasses and pickle look it up there; the module
    of "train.py" has the name "recipe_train_", followed by a digest of the file's path.

    Raises:
      RecipeError: the file, the module or the name does not exist, or is not a `Recipe`.
    """
    place, name = _split(where)
    if not place or (place.startswith(".") and not _is_file(place)):
        raise RecipeError(f"{where!r} names no file or module; "
                          "write train.py, package.module, or either with :name.")
    with _first_on_path(folder(where)):
        module = _execute(pathlib.Path(place)) if _is_file(place) else _import(place)
    found = getattr(module, name, None)
    if not isinstance(found, Recipe):
        raise RecipeError(f"{where}: {_problem(module, place, name)}")
    return found


def folder(where: str) -> str:
    """Returns the folder that Python would search first to run `where`.

    This is the folder of a file, as for `python file.py`, or "" (the working directory) for a
    module, as for `python -m package.module`.
    """
    place, _ = _split(where)
    return str(pathlib.Path(place).parent.resolve()) if _is_file(place) else ""


def _split(where: str) -> tuple[str, str]:
    """Returns the file or module, and the name of the recipe in it."""
    if ":" not in where:
        return where, DEFAULT
    place, _, name = where.rpartition(":")
    return place, name or DEFAULT


def _is_file(place: str) -> bool:
    path = pathlib.Path(place)
    return path.suffix == ".py" or path.is_file()


@contextlib.contextmanager
def _first_on_path(entry: str) -> Iterator[None]:
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the imported code has removed it
            sys.path.remove(entry)


def _import(place: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise
        raise RecipeError(f"there is neither a file nor a module {place!r}; write a path such as "
                          "train.py, or a module that Python can import from here.") from None


def _execute(path: pathlib.Path) -> ModuleType:
    """Returns the module of a file, which is imported again even if it has been imported before."""
    if not path.is_file():
        raise RecipeError(f"there is no file {str(path)!r}.")
    path = path.resolve()
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]  # other folders have the same names
    loader = importlib.machinery.SourceFileLoader(f"recipe_{path.stem}_{digest}", str(path))
    spec = importlib.util.spec_from_file_location(loader.name, path, loader=loader)
    if spec is None or spec.loader is None:
        raise RecipeError(f"{str(path)!r} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(spec.name, None)
        raise
    return module


def _problem(module: ModuleType, place: str, name: str) -> str:
    """Returns why a name is not a recipe, and what to write instead."""
    found = getattr(module, name, None)
    what = f"there is no {name} in it" if found is None else f"{name} is a {type(found).__name__}"
    others = [n for n, value in vars(module).items() if isinstance(value, Recipe)]
    near = difflib.get_close_matches(name, others, 1, 0.0)
    if near:
        return f"{what}; did you mean {place}:{near[0]}?"
    return f"{what}; write recipe = zj.Recipe(init_fn, loss_fn, tx, batch) at its top level."
