"""Thousands of decode steps under every disturbance, bit-equal: `python -m tests.soak`.

`walk` takes the steps and keeps a digest of every block of them; `together` takes several walks at
once, in threads and in processes; `command` is the command.
"""
