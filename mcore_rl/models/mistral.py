"""Mistral: Llama's decoder with a head size of its own."""

from __future__ import annotations

from mcore_rl.models.decoder import DecoderFamily
from mcore_rl.models.spec import MODEL_FAMILIES


class Mistral(DecoderFamily):
    pass


MODEL_FAMILIES.add("mistral", Mistral())
