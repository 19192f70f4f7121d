"""The C++ kernels of ``csrc/`` for torch tensors: shapes, dtypes and devices are checked here, outputs allocated.

A relevance has a leading axis of T targets; layer inputs and outputs, shared by the targets, have none. Tensors are on
the CPU. Kernels compute in float64 where the stream is float64, else in float32; each tensor is of that dtype or of a
half precision, converted on the way through the cache. Those that are not contiguous are copied. Results carry no
autograd history.
"""

from relprop.native.add import add_epsilon, add_gamma, add_normalised, fanout_epsilon
from relprop.native.attention import attention_relevance
from relprop.native.linear import epsilon_select, epsilon_share_out, gamma_share_out, select, share_out
from relprop.native.matmul import attention_shares, rollout_matrix, share, softmax_taylor
from relprop.native.module import _C, available, info
from relprop.native.norm import activation_gradient, activation_slope, norm_gradient, norm_sigma_constant
from relprop.native.products import (
    back_product,
    linear_apply,
    linear_apply_rounded,
    linear_transpose,
    pack_weight,
    products_fast,
    share_out_product,
)
from relprop.native.tensors import (
    FLOATING,
    HALF,
    REFERENCE,
    SIGNED,
    SMALLEST_KEPT,
    Stabiliser,
    empty,
    empty_cache,
)

__all__ = [
    "FLOATING",
    "HALF",
    "REFERENCE",
    "SIGNED",
    "SMALLEST_KEPT",
    "_C",
    "Stabiliser",
    "activation_gradient",
    "activation_slope",
    "add_epsilon",
    "add_gamma",
    "add_normalised",
    "attention_relevance",
    "attention_shares",
    "available",
    "back_product",
    "empty",
    "empty_cache",
    "epsilon_select",
    "epsilon_share_out",
    "fanout_epsilon",
    "gamma_share_out",
    "info",
    "linear_apply",
    "linear_apply_rounded",
    "linear_transpose",
    "norm_gradient",
    "norm_sigma_constant",
    "pack_weight",
    "products_fast",
    "rollout_matrix",
    "select",
    "share",
    "share_out",
    "share_out_product",
    "softmax_taylor",
]
