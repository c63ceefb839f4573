"""What an installation has, what it should have, and the command that mends it: `mcore-rl doctor`.

A check (`checks.py` lists them) looks at one thing and returns rows. What could crash or hang, an
import or a small computation, runs in a process of its own with a deadline (`probe.py`), so that it
is a finding and not the end of the doctor. On several nodes each looks at itself, and node 0 says
who differs (`nodes.py`).
"""
