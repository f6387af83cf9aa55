"""Chinese documents are the twins of English ones: headings, commands, code and figures agree."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TWINS = sorted(
    path.relative_to(ROOT)
    for pattern in ("README.zh-CN.md", "*/README.zh-CN.md", "*/*/README.zh-CN.md")
    for path in ROOT.glob(pattern)
    if not path.relative_to(ROOT).parts[0].startswith(".")
)
HEADING = re.compile(r"^(#+) .+$", re.MULTILINE)
CODE_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def sections_of(path: Path) -> list[tuple[str, str]]:
    """The level of each heading, as its `#` characters, and the text under it."""
    text = path.read_text()
    blocks = CODE_BLOCK.sub(lambda match: " " * len(match[0]), text)  # a comment is no heading
    starts = list(HEADING.finditer(blocks))
    ends = [match.start() for match in starts[1:]] + [len(text)]
    return [(match[1], text[match.end() : end]) for match, end in zip(starts, ends, strict=True)]


def commands_of(section: str) -> list[tuple[str, str]]:
    """The language and the lines of each code block, without comments."""
    blocks = []
    for language, block in CODE_BLOCK.findall(section):
        lines = [re.sub(r"(^|\s+)#.*$", "", line) for line in block.splitlines()]
        blocks.append((language, "\n".join(lines)))
    return blocks


def prose_of(section: str) -> str:
    return CODE_BLOCK.sub("", section)


def figures_of(section: str) -> Counter:
    """The numbers of the prose, without those in code and in the targets of links."""
    prose = re.sub(r"`[^`]*`", "", prose_of(section))
    return Counter(NUMBER.findall(re.sub(r"\]\([^)]*\)", "]", prose)))


def code_words_of(section: str) -> set[str]:
    prose = " ".join(prose_of(section).split())
    return set(re.findall(r"`([^`]+)`", prose))


def links_of(section: str) -> Counter:
    targets = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(section)):
        file, _, anchor = target.replace(".zh-CN", "").partition("#")
        is_translated = file == "" or file.endswith("README.md")
        targets.append(file if is_translated else f"{file}#{anchor}")
    return Counter(targets)


def tables_of(section: str) -> list[int]:
    """The number of cells in each line of a table."""
    return [line.count("|") for line in section.splitlines() if line.startswith("|")]


def test_every_model_has_a_twin():
    folders = {str(path.parent) for path in TWINS}
    models = {"ssd_mmdet", "ssd_resnet34", "ssd_resnet34/tfrecord", "m2det", "fcos"}
    assert folders == {".", *models}


@pytest.mark.parametrize("chinese", TWINS, ids=str)
def test_twins_agree(chinese):
    ours = sections_of(ROOT / chinese)
    english = sections_of((ROOT / chinese).with_name("README.md"))
    assert [level for level, _ in ours] == [level for level, _ in english]
    for position, ((_, chinese_text), (_, english_text)) in enumerate(
        zip(ours, english, strict=True)
    ):
        for what in (commands_of, tables_of, figures_of, code_words_of, links_of):
            one = what(chinese_text)
            other = what(english_text)
            assert one == other, f"section {position}: {what.__name__}"
