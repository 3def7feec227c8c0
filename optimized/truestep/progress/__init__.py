"""What a display of progress is made of.

`view` takes in the events, and says what is to be shown; `session` knows about times, and how it ends; `drawing` makes
rows of both. `outlet` decides between a `terminal`, a `notebook` and plain `lines`. `live` is what the first two share;
`streams` and `keeper` are the terminal's. `place` is that of the Trainer's own callbacks.
"""
