"""What a response says apart from its thoughts.

Thoughts stand between `<think>` and `</think>`. Templates of models that always think open them at
the end of the prompt. What a response says in a thought that never closes it has not said.
"""

from __future__ import annotations

_OPEN, _CLOSE = "<think>", "</think>"


def after_thoughts(prompt: str, response: str) -> str:
    """Return what follows the last thought; of one that never closes, what stands before it.

    Args:
        prompt: as the model sees it, the template applied.
        response: what it wrote.
    """
    if prompt.rstrip().endswith(_OPEN):
        response = _OPEN + response
    return response.rpartition(_CLOSE)[2].partition(_OPEN)[0]
