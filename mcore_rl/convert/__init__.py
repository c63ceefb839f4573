"""Offline conversion between Hugging Face folders and Megatron's distributed checkpoints.

    mcore-rl convert hf-to-mcore /models/Qwen3-30B-A3B /models/Qwen3-30B-A3B-mcore
    mcore-rl convert mcore-to-hf runs/x/checkpoints/global_step_20 /models/mine

A model is never built and never whole in memory: pieces of at most `convert.PIECE_BYTES` are read,
rearranged by the family's mapping list and written. No process group, no device.
"""
