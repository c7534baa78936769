"""ZeRO for JAX as a sharding policy: pick a stage, keep the model, the optimizer and the loop."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zerojax import remat as remat
    from zerojax import viz as viz
    from zerojax.advice import advise as advise
    from zerojax.checkpoint.checkpointer import Checkpointer as Checkpointer
    from zerojax.checkpoint.checkpointer import Restored as Restored
    from zerojax.checkpoint.safetensors import export_safetensors as export_safetensors
    from zerojax.checkpoint.safetensors import load_safetensors as load_safetensors
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
    from zerojax.layout.mesh import make_mesh as make_mesh
    from zerojax.layout.padded import Padded as Padded
    from zerojax.layout.padded import logical as logical
    from zerojax.layout.report import Layout as Layout
    from zerojax.layout.topology import Gpu as Gpu
    from zerojax.layout.topology import Topology as Topology
    from zerojax.plan.plan import Plan as Plan
    from zerojax.policy import Precision as Precision
    from zerojax.processes.joining import initialize as initialize
    from zerojax.processes.preemption import Preemption as Preemption
    from zerojax.recipe import Recipe as Recipe
    from zerojax.train.loss import Loss as Loss
    from zerojax.train.loss_scale import LossScale as LossScale
    from zerojax.train.state import TrainState as TrainState
    from zerojax.zero import Zero as Zero

__version__ = "0.1.0"

# imported when first used: `zerojax theory` needs no jax
_WHERE = {
    "advice": ["advise"],
    "checkpoint.checkpointer": ["Checkpointer", "Restored"],
    "processes.joining": ["initialize"],
    "errors": ["BatchError", "CheckpointError", "ClusterError", "CompileError", "CorruptCheckpointError", "LayoutError",
               "LossError", "MissingExtraError", "ModelError",
               "NonFiniteError", "PlanError", "PolicyError", "RecipeError", "StateError", "ZeroError"],
    "layout.report": ["Layout"],
    "train.loss": ["Loss"],
    "layout.mesh": ["make_mesh"],
    "layout.padded": ["Padded", "logical"],
    "plan.plan": ["Plan"],
    "policy": ["Precision"],
    "processes.preemption": ["Preemption"],
    "recipe": ["Recipe"],
    "train.loss_scale": ["LossScale"],
    "data.feeding": ["Indexed", "feed"],
    "train.state": ["TrainState"],
    "layout.topology": ["Gpu", "Topology"],
    "checkpoint.safetensors": ["export_safetensors", "load_safetensors"],
    "zero": ["Zero"],
}
_MODULES = ["remat", "viz"]
__all__ = sorted([name for names in _WHERE.values() for name in names] + _MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str):
    for module, names in _WHERE.items():
        if name in names:
            return getattr(importlib.import_module(f"zerojax.{module}"), name)
    if name in _MODULES:
        return importlib.import_module(f"zerojax.{name}")
    raise AttributeError(f"module 'zerojax' has no attribute {name!r}")


def __dir__():
    return __all__
