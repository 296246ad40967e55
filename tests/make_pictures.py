"""Draw the pictures of the README: terminals as SVG, a page as PNG (that needs Chromium).

    python tests/make_pictures.py

A picture is of what the command prints on the sample model; kernels and times are those of the
machine it was drawn on.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "samples/pictures"
SAMPLE = "samples/tiny-llama"
WIDTH = 90
FIRST, LAST = 20, 14  # lines of a picture at most, what is between is left out
COMMAND = [sys.executable, "-m", "qconvert"]


def output(folder: Path, *arguments: str) -> str:
    """What a command prints, on a terminal so wide."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": str(WIDTH), "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr.partition("error:")[2]


def terminal(name: str, line: str, text: str) -> None:
    """A picture of a terminal with a command and what it printed."""
    lines = text.splitlines()
    shown = lines
    if len(lines) > FIRST + LAST:
        shown = [*lines[:FIRST], "...", *lines[-LAST:]]
    console = Console(record=True, width=WIDTH, file=io.StringIO(), legacy_windows=False)
    console.print(Text("$ " + line, style="bold"))
    console.print(Text("\n".join(shown)))
    svg = console.export_svg(title="qconvert", unique_id=name)
    # Fonts of the network are not fetched for a picture: the reader's own will do.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    (PICTURES / f"{name}.svg").write_text(svg, "utf-8")


def page(name: str, path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print(f"no Chromium here: {name}.png stays as it is")
        return
    subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--window-size=1000,900", f"--screenshot={PICTURES / name}.png", path.as_uri()),
        ],
        capture_output=True,
        check=True,
    )


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shutil.copytree(ROOT / SAMPLE, place / SAMPLE)
        terminal("inspect", f"qconvert inspect {SAMPLE}", output(place, "inspect", SAMPLE, "-q"))
        made = ("broken.qblk", "--against", SAMPLE)
        output(place, "quantize", SAMPLE, "--scheme", "q2_tensor", "-o", made[0], "-q")
        told = output(place, "verify", *made, "-q", "--html", "page.html")
        terminal("verify", f"qconvert verify {' '.join(made)}", told)
        page("page", place / "page.html")


if __name__ == "__main__":
    main()
