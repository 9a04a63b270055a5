"""Speculation: a step takes drafts of the next tokens beside the one that is certain.

`source` says what a source of drafts is. `lookup` finds them in what a sequence holds already.
`draft` is a model that writes them, `drafting` its side on the device, `draft_loop` the host's.
`accept` says how many of them were right. `block` is what runs on the device in place of
`ffjax.loop.decode_block`, `loop` orders it, and `lines` hands its tokens out position by position.
`choice` is what may be asked for.
"""
