"""`MCORE_RL_PLUGINS=my_pkg.my_loss,...`: modules that every process of a run imports first, because
they register something."""

from __future__ import annotations

import importlib
import os
import sys

from mcore_rl.errors import UserError

PLUGINS_VARIABLE = "MCORE_RL_PLUGINS"


def import_plugins() -> None:
    """Import the modules that the environment names, also those of the working directory.

    Raises:
        UserError: if one cannot be imported.
    """
    for name in filter(None, os.environ.get(PLUGINS_VARIABLE, "").split(",")):
        sys.path.insert(0, os.getcwd())
        try:
            importlib.import_module(name.strip())
        except ImportError as error:
            raise UserError(f"{PLUGINS_VARIABLE} names {name!r}: {error}.") from error
        finally:
            sys.path.pop(0)
