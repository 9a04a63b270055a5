"""The place of `python -m pallas_kernels.compile_table`: see `ffjax.commands.compile_table`."""
