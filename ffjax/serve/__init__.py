"""An endpoint that speaks OpenAI's protocol, over a batch whose sequences come and go.

`scheduler` is the thread that owns the batch; `job` is one sequence that it runs, `slots` says
which row's cache to go on with, `batch` what is needed of a batch. `asked` reads what a request
asks for, `fields` knows every field there is, `answers` writes what is sent back, `token_text` the
single tokens in it, `errors` what goes wrong. `handlers` connects both sides, `app` has the routes,
`metrics` counts. `server` binds the address, runs all of it and ends it.

Needs the extra `serve`.
"""
