"""The fused decode step: one GPU kernel from the embedding to the logits.

It lies in `stream`: one loop over all weights, activations handed over in tagged words.
`docs/kernel.md` explains it; `ffjax.decode_step` is the way in. `prefill` and `draw` hold the
kernels of prompts and of sampling, `compile` compiles a step for a GPU that need not be here.
"""
