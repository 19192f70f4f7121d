"""The kernels as `torch.library` custom ops: ``torch.ops.relprop.<kernel>``, registered when this module is imported.

Each op has a schema, a fake kernel, a pure-PyTorch implementation for every device (`relprop.ops.reference`) and the
compiled kernel where there is one: C++ on the CPU, CUDA or Triton on a GPU (`relprop.ops.on_gpu` says which ops and
which calls, `relprop info` whether it was built). An implementation for another device is registered per op:

    from relprop.ops import OPS
    OPS["add_gamma"].register_kernel("xpu")(launcher)

with the op's own signature; `OPS["add_gamma_out"]` is the variant that writes to tensors given. Streams have a leading
axis of T targets. Results carry no autograd history; a backward pass through an op raises.

The engine calls `relprop.native` itself: an op's dispatch costs several times what the checks of a wrapper do.
"""

from relprop.ops.registry import OPS, Spec

__all__ = ["OPS", "Spec"]
