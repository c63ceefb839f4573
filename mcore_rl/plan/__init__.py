"""What a run would do, reported before anything is started: what each device holds, how steps are
packed, what fits into memory (`trainer.dry_run=true`, `mcore-rl plan`).

It starts no process, builds no model and reads no weights: a folder with `config.json` is enough.
"""
