"""The kernel for Mosaic GPU: Pallas's other backend for NVIDIA GPUs.

Mosaic's own lowering takes other kernels than ours: it knows arrays in whole warp groups, and no
gathers. So the body is traced as for any backend, and lowered here: each operation on an array
becomes what every thread does with its elements. The texts of PTX are the same.
"""

__all__ = ["MODULE"]

MODULE = "jax._src.pallas.mosaic_gpu"
"""What a version of JAX has that has the backend."""
