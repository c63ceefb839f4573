"""What runs in the worker processes: the actor's steps and the engine's host."""
