"""Triton kernels, one file per rule; shipped and imported as ``relprop.kernels``."""
