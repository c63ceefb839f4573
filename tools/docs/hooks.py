"""What mkdocs calls while it builds the site: adds the pages that are generated.

A generated page is written nowhere but into the site, so it cannot be out of date. `mkdocs.yml`
names this file; mkdocs makes the modules beside it importable.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import architecture
import configuration_page
import metrics_page
import verl_page

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[2]

OF_THE_ROOT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Files of the repository's root -> their pages."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def pages() -> dict[str, str]:
    """Return the text of every generated file by its name in the site."""
    return {
        "architecture.svg": architecture.svg(),
        "configuration.md": configuration_page.page(),
        "metrics.md": metrics_page.page(),
        "verl-options.md": verl_page.page(),
        **{page: _linked((ROOT / file).read_text()) for file, page in OF_THE_ROOT.items()},
    }


def _linked(text: str) -> str:
    """Return the text of a file of the root with its links as they are from a page of docs/."""
    text = re.sub(r"\]\(docs/", "](", text)
    for file, page in OF_THE_ROOT.items():
        text = text.replace(f"]({file})", f"]({page})")
    return text
