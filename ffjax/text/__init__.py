"""Text in, text out: a model and its tokenizer together.

`stop_strings` finds what ends a text, `writer` turns the tokens of one text into characters,
`completion` is what came of it. `defaults` reads how a checkpoint wants tokens chosen. `batches`
runs prompts side by side, `stream` hands out pieces of one, `session` keeps a conversation's cache.
`generator` puts them together.
"""
