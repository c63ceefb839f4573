"""Carriers made from lists, which become arrays when a carrier is made."""

from typing import Any

from mcore_rl.rollout.base import GenerationRequest, GenerationResult
from mcore_rl.types import Prompt, Sample, TokenSequence


def make_prompt(**fields: Any) -> Prompt:
    return Prompt(**fields)


def make_sample(**fields: Any) -> Sample:
    return Sample(**fields)


def make_sequence(**fields: Any) -> TokenSequence:
    return TokenSequence(**fields)


def make_request(**fields: Any) -> GenerationRequest:
    return GenerationRequest(**fields)


def make_result(**fields: Any) -> GenerationResult:
    return GenerationResult(**fields)
