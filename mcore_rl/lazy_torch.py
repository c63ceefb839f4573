"""`from mcore_rl.lazy_torch import torch`: torch, imported when something of it is first asked for.

Options are declared next to the mathematics that reads them. A command that composes, shows or
refuses a configuration needs only the options, and importing torch would take most of its time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            import torch

            found = getattr(torch, name)
            setattr(self, name, found)
            return found

    torch = _Torch()
