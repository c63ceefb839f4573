"""Make a small Qwen3-MoE checkpoint with random weights and a tokenizer of its own.

    python examples/quickstart/make_model.py --out outputs/quickstart/base

The folder is an ordinary Hugging Face checkpoint that transformers, vLLM and mcore_rl load. The
same arguments give the same weights; nothing is downloaded. By default the tokenizer has one token
per character, so that a digit is always a token; `--train-tokenizer-on` trains byte-level BPE on
JSON-lines files instead. Both have the same special tokens and the same chat template:

    <|im_start|><|user|>37+48=<|im_end|><|im_start|><|assistant|>     11 tokens
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils.logging import disable_progress_bar

ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = ("<pad>", "<unk>", "<eos>", "<|im_start|>", "<|im_end|>", *ROLE_TOKENS)
CHARACTERS = ("\n", *(chr(code) for code in range(32, 127)))

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|><|{{ message['role'] }}|>{{ message['content'] }}<|im_end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|><|assistant|>{% endif %}"
)

# What vLLM's CPU attention computes; it accepts others and fails at the first token.
HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)


def char_tokenizer() -> Tokenizer:
    """Return a tokenizer with one token per printable ASCII character and newline."""
    vocab = {token: token_id for token_id, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def bpe_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer trained on `texts`; every digit stays a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def read_texts(files: Sequence[Path]) -> Iterator[str]:
    """Yield every string of every row of JSON-lines files."""
    for path in files:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield from strings_in(json.loads(line))
                except ValueError as error:
                    raise SystemExit(f"{path}: line {number} is not JSON: {error}") from error


def strings_in(value: Any) -> Iterator[str]:
    """Yield the strings inside a JSON value, keys of objects left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings_in(part)


def with_chat_template(tokenizer: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    """Return the tokenizer as transformers saves and loads it; a turn ends with <|im_end|>."""
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **named,
        extra_special_tokens=[t for t in SPECIAL_TOKENS if t not in named.values()],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


def make_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """Return the model with float32 weights drawn from the seed."""
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,  # pyright: ignore[reportCallIssue]  # an extra that the model reads
        num_experts=args.experts,
        num_experts_per_tok=args.experts_per_token,
        moe_intermediate_size=args.moe_intermediate_size,
        norm_topk_prob=True,
        initializer_range=args.initializer_range,
        max_position_embeddings=args.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(args.seed)
    return Qwen3MoeForCausalLM(config)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--intermediate-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=32, choices=HEAD_DIMS)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--experts-per-token", type=int, default=2)
    parser.add_argument("--moe-intermediate-size", type=int, default=64)
    parser.add_argument("--initializer-range", type=float, default=0.02)
    parser.add_argument("--max-position-embeddings", type=int, default=1024)
    parser.add_argument("--train-tokenizer-on", type=Path, nargs="+", metavar="FILE.jsonl")
    parser.add_argument("--vocab-size", type=int, help="of the trained tokenizer (2048)")
    args = parser.parse_args(argv)
    if args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads} is not a multiple of --kv-heads {args.kv_heads}")
    if args.experts_per_token > args.experts:
        parser.error(f"--experts-per-token {args.experts_per_token} is more than --experts")
    if args.vocab_size and not args.train_tokenizer_on:
        parser.error("--vocab-size is for --train-tokenizer-on; one per character needs none")
    for path in args.train_tokenizer_on or ():
        if not path.is_file():
            parser.error(f"--train-tokenizer-on {path}: there is no such file")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    disable_progress_bar()
    if args.train_tokenizer_on:
        tokens = bpe_tokenizer(read_texts(args.train_tokenizer_on), args.vocab_size or 2048)
    else:
        tokens = char_tokenizer()
    tokenizer = with_chat_template(tokens, args.max_position_embeddings)
    model = make_model(args, tokenizer)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.out}: {num_parameters:,} parameters, {len(tokenizer):,} tokens in the vocabulary")


if __name__ == "__main__":
    main()
