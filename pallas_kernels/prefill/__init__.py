"""Kernels of the prefill, beside XLA's products.

Attributes:
    attention: new tokens of several sequences attend to the key/value cache.
"""
