"""Pages in headless Chromium: what a script finds in them at several widths, and what the console says."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

FRAMES = """<!doctype html>
<html lang="en"><title>probe</title><body><script>
const frames = FRAMES, results = [];
const look = LOOK;
for (const [page, width] of frames) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:3000px;border:0`;
  frame.onload = async () => {
    results.push({ page, ...await look(frame) });
    if (results.length === frames.length) document.body.textContent = "RESULT" + JSON.stringify(results) + "END";
  };
  frame.src = page;
  document.body.append(frame);
}
</script></body></html>
"""


def in_chromium(
    folder: Path,
    look: str,
    widths: tuple[int, ...],
    *options: str,
    pages: tuple[str, ...] = ("page.html",),
    budget_ms: int = 5000,
) -> tuple[list[dict[str, Any]], list[str]]:
    """What the JavaScript function `look(frame)` returns of each page at each width, in that order, with `page`, and
    all that the browser's console printed.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("chromium is not installed; the page was not looked at in a browser: not run")
    frames = [[page, width] for page in pages for width in widths]
    (folder / "probe.html").write_text(FRAMES.replace("FRAMES", json.dumps(frames)).replace("LOOK", look))
    command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += ["--enable-logging=stderr", f"--user-data-dir={folder / 'browser'}", *options]
    command += [f"--virtual-time-budget={budget_ms}", "--dump-dom", (folder / "probe.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    found = re.search("RESULT(.*)END", html.unescape(done.stdout), re.DOTALL)
    assert found, done.stdout[-500:]
    results = sorted(json.loads(found[1]), key=lambda one: (pages.index(one["page"]), one["width"]))
    return results, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def scheme(name: str) -> str:
    """The option for `light` or `dark`."""
    return f"--blink-settings=preferredColorScheme={int(name == 'light')}"
