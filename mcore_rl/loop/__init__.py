"""The loops; read `on_policy.py` first. They import neither Megatron nor vLLM nor a launcher."""
