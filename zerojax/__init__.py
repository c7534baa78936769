"""ZeRO for JAX as a sharding policy: pick a stage, keep the model, the optimizer and the loop."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# The table of contents: names by module. Each name is imported when it is first used, because
# `zerojax theory` and `zerojax launch` must start without jax.
_CONTENTS = {
    "advice": ["advise"],
    "checkpoint.checkpointer": ["Checkpointer", "Restored"],
    "checkpoint.exporting": ["export_safetensors"],
    "checkpoint.loading": ["load_safetensors"],
    "checkpoint.plain_orbax": ["load_orbax"],
    "data.feeding": ["Indexed", "feed"],
    "errors": ["BatchError", "CheckpointError", "ClusterError", "CompileError",
               "CorruptCheckpointError", "LayoutError", "LossError", "MissingExtraError",
               "ModelError", "NonFiniteError", "PlanError", "PolicyError", "RecipeError",
               "StateError", "ZeroError"],
    "layout.gpus": ["Gpu"],
    "layout.mesh": ["make_mesh"],
    "layout.padded": ["Padded", "logical"],
    "layout.report": ["Layout"],
    "layout.topology": ["Topology"],
    "plan.plan": ["Plan"],
    "precision": ["Precision"],
    "processes.joining": ["initialize"],
    "processes.preemption": ["Preemption"],
    "recipe": ["Recipe"],
    "train.loss": ["Loss"],
    "train.loss_scale": ["LossScale"],
    "train.muon": ["muon_dimensions"],
    "train.state": ["TrainState"],
    "tuning": ["tune"],
    "wire": ["Wire"],
    "zero": ["Zero"],
}
_SUBMODULES = ["hugging_face", "remat", "viz"]
_MODULE_OF = {name: module for module, names in _CONTENTS.items() for name in names}
__all__ = sorted([*_MODULE_OF, *_SUBMODULES])  # pyright: ignore[reportUnsupportedDunderAll]

# Type checkers cannot read the table, so it is repeated as imports; tests/test_contents.py compares
# the two.
if TYPE_CHECKING:
    from zerojax import hugging_face as hugging_face
    from zerojax import remat as remat
    from zerojax import viz as viz
    from zerojax.advice import advise as advise
    from zerojax.checkpoint.checkpointer import Checkpointer as Checkpointer
    from zerojax.checkpoint.checkpointer import Restored as Restored
    from zerojax.checkpoint.exporting import export_safetensors as export_safetensors
    from zerojax.checkpoint.loading import load_safetensors as load_safetensors
    from zerojax.checkpoint.plain_orbax import load_orbax as load_orbax
    from zerojax.data.feeding import Indexed as Indexed
    from zerojax.data.feeding import feed as feed
    from zerojax.errors import BatchError as BatchError
    from zerojax.errors import CheckpointError as CheckpointError
    from zerojax.errors import ClusterError as ClusterError
    from zerojax.errors import CompileError as CompileError
    from zerojax.errors import CorruptCheckpointError as CorruptCheckpointError
    from zerojax.errors import LayoutError as LayoutError
    from zerojax.errors import LossError as LossError
    from zerojax.errors import MissingExtraError as MissingExtraError
    from zerojax.errors import ModelError as ModelError
    from zerojax.errors import NonFiniteError as NonFiniteError
    from zerojax.errors import PlanError as PlanError
    from zerojax.errors import PolicyError as PolicyError
    from zerojax.errors import RecipeError as RecipeError
    from zerojax.errors import StateError as StateError
    from zerojax.errors import ZeroError as ZeroError
    from zerojax.layout.gpus import Gpu as Gpu
    from zerojax.layout.mesh import make_mesh as make_mesh
    from zerojax.layout.padded import Padded as Padded
    from zerojax.layout.padded import logical as logical
    from zerojax.layout.report import Layout as Layout
    from zerojax.layout.topology import Topology as Topology
    from zerojax.plan.plan import Plan as Plan
    from zerojax.precision import Precision as Precision
    from zerojax.processes.joining import initialize as initialize
    from zerojax.processes.preemption import Preemption as Preemption
    from zerojax.recipe import Recipe as Recipe
    from zerojax.train.loss import Loss as Loss
    from zerojax.train.loss_scale import LossScale as LossScale
    from zerojax.train.muon import muon_dimensions as muon_dimensions
    from zerojax.train.state import TrainState as TrainState
    from zerojax.tuning import tune as tune
    from zerojax.wire import Wire as Wire
    from zerojax.zero import Zero as Zero


def __getattr__(name: str):
    if name in _SUBMODULES:
        return importlib.import_module(f"zerojax.{name}")
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"zerojax.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'zerojax' has no attribute {name!r}")


def __dir__():
    return __all__
