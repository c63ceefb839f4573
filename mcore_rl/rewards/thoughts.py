"""What a response says apart from its thoughts.

Thoughts are between `<think>` and `</think>`. Templates of models that always think open them at
the end of the prompt. Text in a thought that never closes does not count.
"""

from __future__ import annotations

_OPEN, _CLOSE = "<think>", "</think>"


def after_thoughts(prompt: str, response: str) -> str:
    """Return the text after the last thought; if it never closes, the text before it.

    Args:
        prompt: as the model sees it, the template applied.
        response: what it wrote.
    """
    if prompt.rstrip().endswith(_OPEN):
        response = _OPEN + response
    return response.rpartition(_CLOSE)[2].partition(_OPEN)[0]
