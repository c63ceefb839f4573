"""Distributed checkpoints as files: what Megatron and torch read and write, by code of our own."""
