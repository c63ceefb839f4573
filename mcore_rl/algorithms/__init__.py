"""The mathematics of training: advantages, policy losses, KL, and how they become one objective.

Read `objective.py` first; it names the rest in the order of use. Everything here is a pure function
of tensors or carriers, on any device, and knows nothing of processes: what needs other ranks comes
in through `Denominators` (counts) and `Segments` (sums over a sequence).
"""
