"""Kimi-K2: DeepSeek-V3 under another `model_type`, with one group of experts.

Hub checkpoints are in FP8, which is refused: convert them to bfloat16 first. Their tokenizer is
code of the folder, which is not run: put a `tokenizer.json` beside the weights.
"""

from __future__ import annotations

from transformers import DeepseekV3Config

from mcore_rl.models.deepseek_v3 import DeepseekV3
from mcore_rl.models.spec import MODEL_FAMILIES


class KimiK2(DeepseekV3):
    config_class = DeepseekV3Config


MODEL_FAMILIES.add("kimi_k2", KimiK2())
