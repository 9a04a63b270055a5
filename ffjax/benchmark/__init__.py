"""Measuring decode steps, prompts and generations: how long, and whether the numbers are right.

Decode steps: `contenders` and `baseline` are what can be timed; `check` compares the step that was
timed with another implementation; `suite` runs a sweep; `report` and `plot` show it. Prompts:
`flops` counts their operations, `prompt_check` compares a prefill with the reference, `prompts`
runs a sweep, `prompt_report` and `prompt_plot` show it. Generations: `loops` and `loop_report`.

For all of them, `asked` refuses what cannot be measured, `inputs` makes weights, prompts and a
cache, `bandwidth` and `dense_rate` measure what the device can do, `timing` times things in turn,
`machine` and `tables` say what ran where. `ffjax.commands.bench` is the command line on top.
"""
