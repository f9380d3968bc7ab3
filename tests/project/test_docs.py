"""What the documents name is there: links, paths, make targets, commands, flags, options, variables."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from dwdp.cli.main import cli
from dwdp.cli.options import flag_name
from dwdp.config import DwdpConfig

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *(
        page
        for folder in ("docs", "benchmarks", "examples")
        for page in sorted((ROOT / folder).rglob("*.md"))
    ),
]
DOCUMENT_IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
MADE_BY_SETUP = (".venv",)
# What else stands alone in a table's cell, in capitals of five or more, is a figure that was forgotten.
NAMES_IN_CAPITALS = {"CUTEDSL", "CUTLASS", "DEEPGEMM", "TRITON", "TRTLLM", "VANILLA"}

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"^[\w.-]+(/[\w.-]+)*/?$")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def anchors(path: Path) -> set[str]:
    """The anchors that a Markdown viewer makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", read(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def inline_code(path: Path) -> list[str]:
    return _INLINE_CODE.findall(_CODE_BLOCK.sub("", read(path)))


def command_lines(path: Path) -> list[list[str]]:
    """Words of every shell command in the document: code blocks of a shell, and inline code."""
    lines: list[str] = []
    for language, body in _CODE_BLOCK.findall(read(path)):
        if language in ("bash", "console", "sh"):
            lines += body.replace("\\\n", " ").splitlines()
    lines += [code for code in inline_code(path) if " " in code]
    commands = []
    for line in lines:
        try:
            words = shlex.split(line.removeprefix("$ "), comments=True)
        except ValueError:
            continue
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            commands.append([words[0].rpartition("/")[2], *words[1:]])
    return commands


@pytest.mark.parametrize("path", DOCUMENTS, ids=DOCUMENT_IDS)
def test_relative_links_lead_somewhere(path: Path) -> None:
    for link in _LINK.findall(read(path)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{link} does not exist"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=DOCUMENT_IDS)
def test_repository_paths_exist(path: Path) -> None:
    top_level = {entry.name for entry in ROOT.iterdir() if entry.is_dir()} | {".ci", "csrc", "docs"}
    for code in inline_code(path):
        first = code.partition("/")[0]
        is_path = _PATH.match(code) and (
            ("/" in code and first in top_level)
            or code.endswith((".md", ".py", ".toml", ".txt", ".cpp", ".hpp", ".yaml"))
        )
        if is_path and first not in MADE_BY_SETUP:
            assert (ROOT / code).exists() or (path.parent / code).exists(), f"{code} is not there"


@pytest.mark.parametrize("path", DOCUMENTS, ids=DOCUMENT_IDS)
def test_no_table_has_a_placeholder(path: Path) -> None:
    rows = [line for line in read(path).splitlines() if line.startswith("|")]
    cells = {cell.strip(" *`_") for row in rows for cell in row.split("|")}
    assert {cell for cell in cells if re.fullmatch(r"[A-Z]{5,}", cell)} <= NAMES_IN_CAPITALS


@pytest.mark.parametrize("path", DOCUMENTS, ids=DOCUMENT_IDS)
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", read(ROOT / "Makefile"), re.MULTILINE))
    for words in command_lines(path):
        if words[0] == "make":
            named = {word for word in words[1:] if "=" not in word and not word.startswith("-")}
            assert named <= targets, f"{' '.join(words)}: no such target"


@pytest.mark.parametrize("path", DOCUMENTS, ids=DOCUMENT_IDS)
def test_commands_and_flags_exist(path: Path) -> None:
    context = click.Context(cli)
    for words in command_lines(path):
        if words[0] != "dwdp" or len(words) == 1 or words[1].startswith("-"):
            continue
        command = cli.get_command(context, words[1])
        assert command is not None, f"{' '.join(words)}: no such command"
        flags = {"-h", "--help"}
        for parameter in command.params:
            flags |= {*parameter.opts, *parameter.secondary_opts}
        used = {word.partition("=")[0] for word in words[2:] if word.startswith("-")}
        assert used <= flags, f"{' '.join(words)}: unknown {', '.join(sorted(used - flags))}"


def test_the_command_parser_sees_blocks_and_inline_code(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Try `FOO=1 make test`.\n\n```bash\n.venv/bin/dwdp generate M \\\n  --x 1  # no\n```\n"
    )
    assert command_lines(page) == [["dwdp", "generate", "M", "--x", "1"], ["make", "test"]]


def test_the_option_table_matches_the_config() -> None:
    rows = re.findall(r"^\| `(--[a-z-]+)` \| ([^|]+) \|", read(ROOT / "README.md"), re.MULTILINE)
    defaults = {flag: default.strip() for flag, default in rows}
    assert list(defaults) == [flag_name(name) for name in DwdpConfig.model_fields]
    for name, field in DwdpConfig.model_fields.items():
        if field.default is not None:
            assert defaults[flag_name(name)] == str(field.default), name


def test_the_variable_table_names_every_variable_that_is_read() -> None:
    sources = [ROOT / "setup.py", *(ROOT / "dwdp").rglob("*.py")]
    used = {name for path in sources for name in re.findall(r'"(DWDP_[A-Z_]+)"', read(path))}
    used -= {"DWDP_VERSION", "DWDP_WITH_CUDA"}  # macros of the native build
    rows = re.findall(r"^\| (`DWDP_.+?) \|", read(ROOT / "README.md"), re.MULTILINE)
    documented = {name for row in rows for name in re.findall(r"`(DWDP_\w+)`", row)}
    assert documented == used
