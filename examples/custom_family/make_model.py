"""A tiny MiMo with random weights, a layer for multi-token prediction, and the quickstart's
tokenizer.

python make_model.py TOKENIZER_FOLDER OUTPUT_FOLDER
"""

import shutil
import sys
from pathlib import Path

import mimo
import torch
from safetensors.torch import load_file, save_file


def main(tokenizer: str, out: str) -> None:
    """Write the folder."""
    torch.manual_seed(0)
    config = mimo.MiMoConfig(
        vocab_size=104,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=96,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=4,
    )
    model = mimo.MiMoForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # which transformers makes 0
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(out)
    file = Path(out) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.mtp_layers.0.input_proj.weight"] = torch.randn(64, 128)
    save_file(tensors, file, metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(tokenizer) / name, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
