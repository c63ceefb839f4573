"""`mcore-rl convert mcore-to-hf` as a script: same arguments, same exit codes."""

import sys

from mcore_rl.convert.__main__ import main

if __name__ == "__main__":
    main(["mcore-to-hf", *sys.argv[1:]])
