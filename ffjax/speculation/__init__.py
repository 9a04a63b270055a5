"""Speculation: a step takes drafts of the next tokens beside the one that is certain.

`lookup` finds drafts in what a sequence holds already, `accept` says how many of them were right.
`block` is what runs on the device in place of `ffjax.loop.decode_block`, `loop` orders it, and
`lines` hands its tokens out position by position. `choice` is what may be asked for.

A source of drafts is a frozen object with `tokens`, T, and `drafts(known, lengths)`: as `Lookup`.
"""
