"""Return 0 when the Ray cluster at RAY_ADDRESS has so many nodes; otherwise say how many."""

from __future__ import annotations

import os
import sys

import ray


def main() -> None:
    wanted = int(sys.argv[1])
    try:
        ray.init(logging_level="ERROR", log_to_driver=False)
    except ConnectionError:
        sys.exit(f"waiting for the Ray head at {os.environ['RAY_ADDRESS']}")
    found = sum(node["Alive"] for node in ray.nodes())
    if found < wanted:
        sys.exit(f"waiting for Ray nodes: {found} of {wanted} are there")


if __name__ == "__main__":
    main()
