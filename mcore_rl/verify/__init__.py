"""Checks that a user can run on a model and a machine: `mcore-rl verify CHECK ...`.

A check is a module with `add_parser`, listed in `__main__.py`.
"""
