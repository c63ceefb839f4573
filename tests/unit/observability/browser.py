"""Pages in a real browser, without a window."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LIMIT_S = 60


def _find() -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"there is no browser: none of {', '.join(NAMES)}")
    return found


def _start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # No sandbox: it asks for privileges that containers do not give, and the page is our own.
    command = [
        *(_find(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--enable-logging=stderr", "--virtual-time-budget=5000", f"--user-data-dir={folder}"),
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert said == [], "the page reports an error"
    return done


def dom(page: Path, folder: Path, state: str = "") -> str:
    """Return the page as its script has built it, without the script and its data.

    Args:
        page: its file.
        folder: for what the browser writes.
        state: behind the "#" of the address.
    """
    text = _start(folder, "--dump-dom", f"{page.as_uri()}#{state}").stdout
    return re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)


def screenshot(
    page: Path, folder: Path, state: str = "", size: tuple[int, int] = (1280, 3000)
) -> Path:
    """Return a picture of the page, a PNG in `folder`."""
    file = folder / "screenshot.png"
    window = f"--window-size={size[0]},{size[1]}"
    _start(folder, window, f"--screenshot={file}", f"{page.as_uri()}#{state}")
    return file
