"""Pallas's Triton backend: what the kernels need of it, and of JAX's private interface to it."""

__all__ = ["MODULE"]

MODULE = "jax._src.pallas.triton"
"""What a version of JAX has that has the backend."""
