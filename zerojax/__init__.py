"""ZeRO for JAX as a sharding policy: pick a stage, keep the model, the optimizer and the loop."""

from zerojax import policies
from zerojax.box import whole
from zerojax.data import feed
from zerojax.errors import (
    BatchError,
    LayoutError,
    LossError,
    MissingExtraError,
    ModelError,
    NonFiniteError,
    PolicyError,
    ZeroError,
)
from zerojax.layout import Layout
from zerojax.loss import Loss
from zerojax.mesh import make_mesh
from zerojax.policy import Precision
from zerojax.state import TrainState
from zerojax.zero import Zero

__version__ = "0.1.0"
__all__ = [
    "BatchError",
    "Layout",
    "LayoutError",
    "Loss",
    "LossError",
    "MissingExtraError",
    "ModelError",
    "NonFiniteError",
    "PolicyError",
    "Precision",
    "TrainState",
    "Zero",
    "ZeroError",
    "feed",
    "make_mesh",
    "policies",
    "whole",
]
