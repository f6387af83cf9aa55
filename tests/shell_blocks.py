"""The shell commands of a document: which there are, and which of them a test can run."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+?) -->\n\n?)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A block of code of a document; `reason` says why no test runs it, empty where one does."""

    language: str
    text: str
    line: int  # of the document, from 1
    reason: str


def blocks_of(path: Path) -> list[Block]:
    """Return the blocks of a document in order."""
    text = path.read_text()
    blocks = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        blocks.append(Block(match["language"], match["text"], line, match["reason"] or ""))
    return blocks


def commands_of(block: Block) -> list[str]:
    """Return the commands of a shell block, each on one line and without its comment."""
    lines = block.text.replace("\\\n", " ").splitlines()
    commands = []
    for line in lines:
        command = re.sub(r"(^|\s+)#.*$", "", line).strip()
        if command:
            commands.append(" ".join(command.split()))
    return commands


def words_of(command: str) -> list[str]:
    """Return the words of a command, without the brackets of what may be left out."""
    return shlex.split(re.sub(r"[\[\]]", "", command))
