"""NVIDIA's compute-sanitizer over small decode steps of every kind: `python -m tests.sanitize`.

`cases` says which steps; `steps` takes them, in a process of its own; `apart` changes what
racecheck is shown; `planted` plants errors that a tool must find; `sanitizer` finds NVIDIA's
program and starts it; `findings` reads what it said; `command` is the command.
"""
