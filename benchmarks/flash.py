"""cuDNN's flash attention, for plans on a machine without cuDNN.

`jax.nn.dot_product_attention(implementation="cudnn")` looks for cuDNN and for devices when it is
traced. The function here calls the same kernels of cuDNN by their names in XLA. The GPU compiler
schedules them without cuDNN, and a plan counts them. They are not meant to run.
"""

import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

_PRODUCTS = {  # of the dimensions of both operands, the one that each product contracts
    "bmm1": (3, 3), "bmm2": (3, 1), "bmm1_grad_gemm1": (2, 1), "bmm1_grad_gemm2": (3, 1),
    "bmm2_grad_gemm1": (2, 1), "bmm2_grad_gemm2": (3, 3)}


def attention(q, k, v, mesh):
    """Returns the causal attention of `[batch, time, heads, width]` in bfloat16.

    Args:
      mesh: the batch is divided over all its axes.
    """
    spec = P(mesh.axis_names)
    return jax.shard_map(_attention, mesh=mesh, in_specs=spec, out_specs=spec,
                         check_vma=False)(q, k, v)


@jax.custom_vjp
def _attention(q, k, v):
    return _forward(q, k, v)[0]


def _forward(q, k, v):
    batch, time, heads, _ = q.shape
    statistics = jax.ShapeDtypeStruct((batch, heads, time), jnp.float32)
    made = _call("__cudnn$fmhaSoftmax", ("bmm1", "bmm2"), (q, k, v), (_as_result(q), statistics))
    out, kept = (checkpoint_name(x, "attention") for x in (made[0].transpose(0, 2, 1, 3), made[1]))
    return out, (q, k, v, kept, out)


def _backward(saved, cotangent):
    q, k, v, kept, out = saved
    products = [name for name in _PRODUCTS if "grad" in name]
    grads = _call("__cudnn$fmhaSoftmaxBackward", products, (q, k, v, kept, cotangent, out),
                  [_as_result(x) for x in (q, k, v)])
    return tuple(grad.transpose(0, 2, 1, 3) for grad in grads)


_attention.defvjp(_forward, _backward)


def _as_result(x) -> jax.ShapeDtypeStruct:
    """Returns `[batch, heads, time, width]` for `[batch, time, heads, width]`."""
    return jax.ShapeDtypeStruct((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x.dtype)


def _call(target: str, products: Sequence[str], operands: Sequence, results: Sequence) -> list:
    """Returns the results of a kernel of cuDNN, without its workspace."""
    results = (*results, jax.ShapeDtypeStruct((0,), jnp.uint8))
    layouts = [(0, 2, 1, 3) if len(x.shape) == 4 else tuple(range(len(x.shape))) for x in results]
    config = json.dumps(_config(*operands[:2], products))
    call = jax.ffi.ffi_call(target, results, output_layouts=layouts, custom_call_api_version=2,
                            legacy_backend_config=config)
    return list(call(*operands))[:-1]


def _config(q, k, products: Sequence[str]) -> dict:
    """Returns the `cudnn_fmha_backend_config` that XLA expects."""
    batch, time, heads, width = q.shape
    shape = {"element_type": "BF16", "tuple_shapes": [], "is_dynamic_dimension": [False] * 4,
             "dimensions": [str(n) for n in (batch, heads, time, k.shape[1])],
             "layout": {"minor_to_major": ["3", "2", "1", "0"]}}
    algorithm = {"algo_id": "0", "math_type": "TENSOR_OP_MATH", "is_cudnn_frontend": True,
                 "tuning_knobs": {"17": "1", "24": "0"}, "workspace_size": "0"}
    fields = {"algorithm": algorithm, "fmha_scale": width**-0.5, "intermediate_tensor_shape": shape,
              "is_flash_attention": True, "mask_type": "CAUSAL", "dropout_rate": 0.0, "seed": 42,
              "sliding_window_length": 0, "max_seg_per_batch": 1, "is_paged_attention": False}
    fields |= {f"{name}_dot_dimension_numbers": _dimensions(name) for name in products}
    return {"operation_queue_id": "0", "cudnn_fmha_backend_config": fields}


def _dimensions(product: str) -> dict[str, list[str]]:
    left, right = _PRODUCTS[product]
    heads = "2" if (left, right) == (3, 3) else "1"  # weights are [batch, heads, time, time]
    return {"lhs_contracting_dimensions": [str(left)], "rhs_contracting_dimensions": [str(right)],
            "lhs_batch_dimensions": ["0", heads], "rhs_batch_dimensions": ["0", "2"]}
