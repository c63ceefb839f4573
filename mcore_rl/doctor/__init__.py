"""What an installation has, what it should have, and the command that fixes it: `mcore-rl doctor`.

A check (`checks.py` lists them) looks at one thing and returns rows. An import or a small
computation that could crash or hang runs in a process of its own with a deadline (`probe.py`), so
that a failure is a finding and not the end of the doctor. On several nodes each one checks itself,
and node 0 reports which nodes differ (`nodes.py`).
"""
