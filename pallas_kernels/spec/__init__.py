"""The decode step as an executable specification, and a tool that finds where the kernel leaves it.

Start with `segments`: a function for each segment, from the buffers that it reads to those that it
writes. `step` strings them together, in plain `jax.numpy`: it needs no Pallas, and says what the
kernel computes in interpret mode, on the tests' machine of PTX and on a GPU.

    handed      the forms in which numbers are handed over, and what is left of them
    inputs      what a product is given: norms, bfloat16, digits
    weights     what integers and scales stand for
    heads       queries, keys and values
    attention   KV splits
    segments    embed, qkv, attention, attn_out, gate_up, down, head; all names
    step        a whole step

The rest runs the kernel and compares: `python -m pallas_kernels.spec`, or `bisecting.bisect`.

    running     ways to run the kernel
    cutting     the first layers of a step
    reading     buffers, read back from the exchange
    differences what is more than rounding, and what is said of it
    comparing   a layer, and the head, segment by segment
    cached      new keys and values in the cache, and that the rest of it stays
    bisecting   the first difference of a step
    made        random weights and a cache of a model's sizes
"""
