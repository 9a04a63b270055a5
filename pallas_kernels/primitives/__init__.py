"""What the kernels need of JAX's private modules, whichever backend compiles them.

The third of the rooms that import such modules, beside `triton` and `mosaic_gpu`. JAX keeps private
what both of these must agree on, since it is traced before either compiles it: effects that keep
operations in order, and loads and stores with masks. So it cannot lie in one of them. What knows a
backend does not belong here. `tests/test_imports.py` holds everything else to that.
"""

from pallas_kernels.primitives.access import load, store
from pallas_kernels.primitives.operations import (
    ORDERED,
    Primitive,
    effectful,
    made,
    pure,
    reads,
    writes,
)

__all__ = [
    "ORDERED",
    "Primitive",
    "effectful",
    "load",
    "made",
    "pure",
    "reads",
    "store",
    "writes",
]
