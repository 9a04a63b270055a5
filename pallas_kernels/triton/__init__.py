"""Pallas's Triton backend: what the kernel needs of it, and of JAX's private interface to it."""
