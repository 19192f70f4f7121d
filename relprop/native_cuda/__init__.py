"""The CUDA kernels of ``csrc/`` for torch tensors: shapes, dtypes and devices are checked here, outputs allocated.

A stream (relevance or gradient) has a leading axis of T targets; layer inputs and outputs, shared by the targets, have
none. Layer tensors are all float32, all bfloat16 or all float16; streams are float32 or of that dtype. Everything lies
on one GPU, and runs on its current stream. Tensors that are not contiguous are copied. Results carry no autograd
history; sums are float32 or better.
"""

from relprop.native_cuda.add import add_epsilon, add_gamma, add_normalised, fanout_epsilon, most_readers
from relprop.native_cuda.attention import attention_shares, share, softmax_taylor
from relprop.native_cuda.attention_relevance import attention_relevance
from relprop.native_cuda.call import DTYPES, Stabiliser, available, device_type, info
from relprop.native_cuda.gradient import activation_gradient, norm_gradient
from relprop.native_cuda.linear import (
    Back,
    linear_alpha_beta_share_out,
    linear_back,
    linear_epsilon_share_out,
    linear_gamma_share_out,
)

__all__ = [
    "DTYPES",
    "Back",
    "Stabiliser",
    "activation_gradient",
    "add_epsilon",
    "add_gamma",
    "add_normalised",
    "attention_relevance",
    "attention_shares",
    "available",
    "device_type",
    "fanout_epsilon",
    "info",
    "linear_alpha_beta_share_out",
    "linear_back",
    "linear_epsilon_share_out",
    "linear_gamma_share_out",
    "most_readers",
    "norm_gradient",
    "share",
    "softmax_taylor",
]
