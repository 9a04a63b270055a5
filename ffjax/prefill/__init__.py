"""Prefill: prompts go into the cache, and each gets its first new token.

Attributes:
    choice: which implementation runs, and why not the other.
    request: what both have in common.
    first: the first new token, from what the last layer returns.
    packed: the tokens of all prompts one after the other, with a flash attention of its own.
    packing: cuts prompts into the chunks of that.
    products: matrices times the tokens of such a chunk, whatever the matrices' format.
    padded: the reference model, prompts side by side and padded.
"""
