"""The process that runs what a model wrote: it gives up every right before the first line runs.

`rewards/sandbox.py` starts `server.main` in a bare interpreter, which finds the standard library
and this package only. So nothing here imports anything else, and starting takes milliseconds.
"""
