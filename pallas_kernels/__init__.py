"""The fused decode step: one GPU kernel from the embedding to the logits.

`plan` decides who computes what, `phases` holds the step's parts, `sync` what keeps them
apart, `launch` runs them. `ffjax.decode_step` is the way in.
"""
