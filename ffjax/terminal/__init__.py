"""A conversation in a terminal, or in a pipe: what is typed, what is printed, what is kept.

Nothing here knows of models: `partner` says what a chat asks of the one that answers.
"""
