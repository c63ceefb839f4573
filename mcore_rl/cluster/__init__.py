"""What the loops ask for: where processes stand, calls to them, the trainer and the engines."""
