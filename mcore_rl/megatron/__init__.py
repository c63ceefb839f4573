"""The actor: Megatron-Core model, losses on its schedule, optimizer, checkpoints.

This package and `models/` are the only ones that import `megatron.core`. Call `cpu.install()`
before anything else of it is used; it does nothing where CUDA is present.
"""
