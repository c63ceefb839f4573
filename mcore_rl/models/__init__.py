"""How Hugging Face checkpoints and Megatron-Core parameters correspond.

Importing the package registers every family; a new one is its file and one line here.
"""

from mcore_rl.models import qwen2, qwen3, qwen3_moe

__all__ = ["qwen2", "qwen3", "qwen3_moe"]
