"""How Hugging Face checkpoints and Megatron-Core parameters correspond.

Importing the package registers every family; a new one is its file and one line here.
"""

from mcore_rl.models import (
    deepseek_v2,
    deepseek_v3,
    glm4_moe,
    kimi_k2,
    llama,
    mistral,
    mixtral,
    olmoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)

__all__ = [
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "kimi_k2",
    "llama",
    "mistral",
    "mixtral",
    "olmoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
]
