"""The fused decode step: one GPU kernel from the embedding to the logits.

There are two. The phased one: `plan` decides who computes what, `phases` holds the step's
parts, `sync` what keeps them apart, `launch` runs them. The streamed one, in `stream`: one
loop over all weights, activations handed over in tagged words. `docs/kernel.md` compares
them; `ffjax.decode_step` is the way in.
"""
