"""What a bug report needs: what is installed, what can run, and whether it computes rightly.

`ffjax.environment` says versions, devices and settings; `choices` which implementation can run, and
why another cannot; `weights` and `activations` look for numbers that are not finite; `selftest`
runs a few decode steps; `diagnosis` puts them together, and `text` shows it.
`ffjax.commands.doctor` is the command line on top.
"""
