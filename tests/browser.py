"""A real browser without a window: Debian's chromium, which .ci/run installs."""

import shutil
import subprocess
from pathlib import Path
from tempfile import mkdtemp


def chromium(page: Path, fragment: str, *flags: str) -> str:
    """Return what chromium prints of a page's file, whose script runs with `fragment` after the page's name.

    No network: the host names of all requests lead nowhere.
    """
    program = shutil.which("chromium")
    assert program is not None, "there is no chromium: apt-get install chromium, as .ci/run does"
    command = [
        program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
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
