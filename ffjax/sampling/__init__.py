"""How the next token is chosen: what may be asked for, and the device's part of it.

`params` holds what a caller sets, `rows` what the device gets of it, `choose` puts the stages
together: `edits`, `penalties`, `filters`, `draw` and `logprobs`.
"""
