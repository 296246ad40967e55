"""Write the reference of all commands, samples/man/README.md, and man pages beside it, from what
the commands say of themselves.

    python tests/make_commands.py          # write them
    python tests/make_commands.py --check  # exit 1 if one is not current
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from generated import ROOT, write_or_check

from qconvert import __version__
from qconvert.cli.app import app

SAMPLES = ROOT / "samples"
INTRODUCTION = """# All commands and options

Made by `tests/make_commands.py` from what `--help` says. Man pages with the same text are
installed beside the command: `man qconvert-quantize`.
"""
COMPLETION = """
Completion of options, schemes and observers in a shell: `qconvert --install-completion` (bash,
zsh, fish, PowerShell), then start the shell anew.
"""


def commands() -> dict[str, Any]:
    """Each command, by the words that call it."""
    root = typer.main.get_command(app)
    found = {"qconvert": root}
    found.update({f"qconvert {name}": c for name, c in root.commands.items()})  # type: ignore[attr-defined]
    return found


def sections(command: Any) -> dict[str, str]:
    """The help of a command by heading: its first part is ``Description``."""
    text = f"{command.help}\n\n{command.epilog or ''}".replace("\b", "").strip()
    found, heading = {"Description": ""}, "Description"
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.strip("\n").splitlines()
        if match := re.fullmatch(
            r"(Examples|Exit codes|Environment|Words): ?(.*)", lines[0].strip()
        ):
            heading = match[1]
            lines = [*([match[2]] if match[2] else []), *lines[1:]]
        joined = "\n".join(lines)
        found[heading] = f"{found.get(heading, '')}\n\n{joined}".strip("\n")
    return found


def options(command: Any) -> Iterator[tuple[str, str]]:
    """How each argument and option is written, and what it does."""
    context = typer.Context(command)
    for parameter in command.params:
        if record := parameter.get_help_record(context):
            written, text = record
            yield " ".join(written.split()), " ".join(text.split())


def markdown(found: dict[str, Any]) -> str:
    parts = [INTRODUCTION, COMPLETION]
    for name, command in found.items():
        parts.append(f"\n## {name}\n")
        for heading, text in sections(command).items():
            if heading == "Description":
                parts.append(f"\n{text}\n")
            else:
                parts.append(f"\n{heading}:\n\n```text\n{_flush(text)}\n```\n")
        parts.append("\n| option | what it does |\n|---|---|\n")
        parts += [
            f"| `{_cell(written)}` | {_escaped(text)} |\n" for written, text in options(command)
        ]
    return "".join(parts)


def _flush(text: str) -> str:
    """Without the indentation that all lines share."""
    lines = text.splitlines()
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join(line[indent:].rstrip() for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _escaped(text: str) -> str:
    """Markdown with its signs as they are."""
    return re.sub(r"([|*_<>\[\]`])", r"\\\1", text)


def man(name: str, command: Any) -> str:
    """A page for man(1), in the macros of man(7)."""
    title = name.replace(" ", "-")
    told = sections(command)
    summary = " ".join(told["Description"].split("\n\n")[0].split()).rstrip(".")
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    metavars = [p.metavar or p.name.upper() for p in arguments]
    words = " ".join(["[OPTIONS]", *metavars]) if command.params else ""
    lines = [
        ".ad l",  # long lists of names leave no way to fill lines to the right
        f'.TH "{title.upper()}" 1 "" "qconvert {__version__}" "qconvert"',
        ".SH NAME",
        f"{_roff(title)} \\- {_roff(summary[0].lower() + summary[1:])}",
        ".SH SYNOPSIS",
        f".B {_roff(name)}",
        _roff(words),
    ]
    for heading, text in told.items():
        lines.append(f".SH {heading.upper()}")
        if heading == "Description":
            for paragraph in text.split("\n\n"):
                lines += [".PP", _roff(" ".join(paragraph.split()))]
        else:
            lines += [".nf", *(_roff(line) for line in _flush(text).splitlines()), ".fi"]
    lines.append(".SH OPTIONS")
    for written, text in options(command):
        lines += [".TP", f".B {_roff(written)}", _roff(text)]
    return "\n".join(lines) + "\n"


def _roff(text: str) -> str:
    """Text whose signs mean nothing to roff."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text


def documents() -> dict[Path, str]:
    found = commands()
    pages = {
        SAMPLES / "man" / f"{name.replace(' ', '-')}.1": man(name, command)
        for name, command in found.items()
    }
    return {SAMPLES / "man/README.md": markdown(found), **pages}


if __name__ == "__main__":
    sys.exit(write_or_check(documents(), "tests/make_commands.py"))
