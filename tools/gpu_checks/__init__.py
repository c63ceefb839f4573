"""The checks of `tools/gpu_check.py`: a file for each, `programs.py` has them in order.

A check is a function of sizes and device that returns an `Outcome`: numbers, and which of them are
bounded, with the reason for the bound. Checks of one program run in one process, one after the
other; programs are processes of their own, since vLLM changes the one that imports it, a kernel
that fails may take its process along, and what a process held is free when it has ended.
"""
