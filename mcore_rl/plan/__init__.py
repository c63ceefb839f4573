"""What a run would do, said before anything is started: who holds what, how steps are packed, what
fits into memory (`trainer.dry_run=true`, `mcore-rl plan`).

It starts no process, builds no model and reads no weights: a folder with `config.json` is enough.
"""
