"""The command line's subcommands, a module each.

A module has `HELP`, one line; `add_arguments(parser)`; and `run(args)`, which returns the
exit code. What takes long to import is imported inside `run`. Adding one: write the
module, and name it in `ffjax.cli.COMMANDS`.
"""
