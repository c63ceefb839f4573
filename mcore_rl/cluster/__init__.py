"""What the loops use: the placement of processes, calls to them, the trainer and the engines."""
