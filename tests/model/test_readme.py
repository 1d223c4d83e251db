"""README.md: its Python runs, and the commands, options, targets and files it speaks of exist."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from model_patch.cli.app import app

ROOT = Path(__file__).parents[2]
NEEDS_NETWORK = "Qwen/"


def _readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def _python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", _readme(), re.DOTALL | re.MULTILINE)


def _calls(program: str) -> list[str]:
    """Every call of a program in the README: in an indented or fenced line, or in a code span."""
    return [
        (line or span).strip()
        for line, span in re.findall(rf"^ *({program} [^\n]*)$|`({program} [^`\n]*)`", _readme(), re.MULTILINE)
    ]


def _subcommands() -> dict[str, Any]:
    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


def test_its_python_compiles() -> None:
    blocks = _python_blocks()
    assert len(blocks) >= 2
    assert any(NEEDS_NETWORK not in block for block in blocks)
    for block in blocks:
        compile(block, "README.md", "exec")


def test_its_python_runs(tmp_path: Path) -> None:
    for block in _python_blocks():
        if NEEDS_NETWORK in block:
            continue
        command = [sys.executable, "-c", block]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, f"{block}\n{result.stderr}"


def test_its_commands_exist() -> None:
    named = {call.split()[1] for call in _calls("polar")}
    assert len(named) >= 5
    assert named <= _subcommands().keys()


def test_it_names_every_command() -> None:
    named = {call.split()[1] for call in _calls("polar")}
    assert _subcommands().keys() <= named


def test_the_options_of_its_commands_exist() -> None:
    for call in _calls("polar"):
        command = _subcommands()[call.split()[1]]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert set(re.findall(r"(?<=\s)--[a-z-]+", call)) <= known, call


def test_its_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = {call.split()[1] for call in _calls("make")}
    assert {"demo", "test"} <= named
    assert named <= targets


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_to_files(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert links or page.name != "README.md"
