"""Data: files to prompts, samples to micro-batches, micro-batches to tensors."""
