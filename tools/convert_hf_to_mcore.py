"""`mcore-rl convert hf-to-mcore` as a script: same arguments, same exit codes."""

import sys

from mcore_rl.convert.__main__ import main

if __name__ == "__main__":
    main(["hf-to-mcore", *sys.argv[1:]])
