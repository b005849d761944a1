"""Load tests of a server from outside: `arrivals` and `generator` are the open loop, `client` sends, `questions` makes
the requests, `plan` and `soak` run the measurements, `figures` sums them up.

Only `added` needs a pipeline in this process.
"""
