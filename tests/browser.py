"""A real browser without a window: Debian's chromium, which .ci/run installs."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from playwright.sync_api import Page, sync_playwright

NO_NETWORK = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"


def program() -> str:
    """Return the path of chromium, without which a test fails."""
    found = shutil.which("chromium")
    assert found is not None, "there is no chromium: apt-get install chromium, as .ci/run does"
    return found


@contextmanager
def opened(url: str, width: int = 1100, height: int = 1100) -> Iterator[tuple[Page, list[str]]]:
    """Give a page of a server on this computer, for clicks, and the addresses of all that it asked for so far."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program(), args=["--no-sandbox", NO_NETWORK])
        page, asked = browser.new_page(viewport={"width": width, "height": height}), []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        yield page, asked
        browser.close()


def chromium(page: Path, fragment: str, *flags: str) -> str:
    """Return what chromium prints of a page's file, whose script runs with `fragment` after the page's name.

    No network: the host names of all requests lead nowhere.
    """
    command = [
        program(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND", "--run-all-compositor-stages-before-draw",
        "--virtual-time-budget=2000", f"--user-data-dir={mkdtemp(dir=page.parent)}", *flags,
        f"{page.resolve().as_uri()}#{fragment}",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout


def dom_of(page: Path, fragment: str) -> str:
    """Return the page's document after its script has run."""
    return chromium(page, fragment, "--dump-dom")


def screenshot(page: Path, fragment: str, picture: Path, size: tuple[int, int] = (1100, 1400)) -> Path:
    """Write what the page looks like, and return its path."""
    chromium(page, fragment, f"--screenshot={picture}", f"--window-size={size[0]},{size[1]}")
    assert picture.is_file()
    return picture
