"""Operations of a kernel's body that are texts of inline PTX, whichever backend compiles them.

`operation` makes a primitive of JAX of a function that writes a text. `lowered` is how its rule
reaches the backend that compiles. It lies below all that uses it: the kernels (`stream`, `draw`)
bind operations, and the backends' rooms (`triton`, `mosaic_gpu`) call the rules. What the texts of
the decode step say is in `stream.ptx`.
"""
