"""What documents tell users: commands with the programs of others, and messages of ours."""

import ast
import re
import subprocess
import sys

import pytest
from PIL import Image

from common.coco.index import read_index
from tests.scripts import ROOT

VOC = """<annotation><filename>{name}.jpg</filename>
<size><width>40</width><height>30</height><depth>3</depth></size>
<object><name>dog</name>
<bndbox><xmin>5</xmin><ymin>6</ymin><xmax>15</xmax><ymax>16</ymax></bndbox></object>
</annotation>"""

WEBSITE = ("mkdocs==1.6.1", "mkdocs-material==9.8.2")


def commands(program):
    """The command lines of a program in docs/data.md."""
    text = (ROOT / "docs" / "data.md").read_text()
    return re.findall(rf"^{program} .+$", text, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.again  # installs a package
def test_the_converters_commands_make_what_every_program_reads(tmp_path):
    folders = ("Annotations", "JPEGImages", "train/labels", "train/images")
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    for name in ("a", "b"):
        (tmp_path / f"Annotations/{name}.xml").write_text(VOC.format(name=name))
        (tmp_path / f"train/labels/{name}.txt").write_text("1 0.25 0.5 0.25 0.333\n")
        for images in ("JPEGImages", "train/images"):
            Image.new("RGB", (40, 30)).save(tmp_path / images / f"{name}.jpg")
    (tmp_path / "names.txt").write_text("cat\ndog\n")

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    pip = [environment / "bin/python", "-m", "pip", "install", "--quiet", "globox"]
    subprocess.run(pip, check=True)
    voc, yolo = commands("globox")
    for command, images in ((voc, "JPEGImages"), (yolo, "train/images")):
        program = [environment / "bin/globox", *command.split()[1:]]
        subprocess.run(program, cwd=tmp_path, check=True)
        index = read_index(str(tmp_path / "train.json"), str(tmp_path / images))
        assert index.class_names == ("dog",)
        assert len(index) == len(index.table) == 2
        assert index.table.box_xywh[0, 2:].round().tolist() == [10, 10]


SOURCES = ("*.py", "*.sh", "common/**/*.py", "common/**/*.sh", "ssd_*/**/*.py", "m2det/*.py")
VALUE = "\0"  # in place of a value of an f-string: no message has this character


def texts_of_the_code():
    """Every text in the programs and their shell scripts, with single spaces between words."""
    texts = []
    paths = [path for pattern in (*SOURCES, "fcos/*.py") for path in ROOT.glob(pattern)]
    for path in paths:
        if path.suffix == ".sh":
            words_of_echo = r"[\"'] \\\n *[\"']"  # one string ends in a line, another begins
            texts.append(re.sub(words_of_echo, " ", path.read_text()))
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                is_text = [isinstance(part, ast.Constant) for part in node.values]
                parts = zip(node.values, is_text, strict=True)
                texts.append("".join(part.value if text else VALUE for part, text in parts))
    return [" ".join(text.split()) for text in texts]


def test_the_troubleshooting_page_quotes_messages_of_the_code():
    """A quoted message may be of several texts, of a problem and a remedy for instance."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"`(?:error|log): ([^`]+)`", page)
    texts = texts_of_the_code()
    unknown = []
    for message in messages:
        for piece in re.split(r"\.\.\.|; ", message):
            words = piece.strip(" ;:,()")
            if not any(words in text for text in texts):
                unknown.append(f"{words!r} of {message!r}")
    assert len(messages) > 100
    assert not unknown, "\n".join(unknown)


def test_every_page_is_in_the_websites_navigation():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")]
    for model in ("ssd_mmdet", "ssd_resnet34", "ssd_resnet34/tfrecord", "m2det", "fcos"):
        pages += [ROOT / model / "README.md", ROOT / model / "README.zh-CN.md"]
    named = set(re.findall(r"- .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {str(page.relative_to(ROOT)) for page in pages} <= named
    for page in named:
        assert (ROOT / ".ci/site" / page).samefile(ROOT / page)


def test_the_picture_of_the_readme_loads_quickly():
    assert (ROOT / "docs/quickstart.jpg").stat().st_size < 300_000


@pytest.mark.slow
@pytest.mark.again  # installs packages
def test_the_website_is_built_without_a_warning(tmp_path):
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    pip = [environment / "bin/python", "-m", "pip", "install", "--quiet", *WEBSITE]
    subprocess.run(pip, check=True)
    site = tmp_path / "site"
    build = [environment / "bin/mkdocs", "build", "--strict", "--site-dir", site]
    subprocess.run(build, cwd=ROOT, check=True)
    assert "wrong checksum" in (site / "docs/troubleshooting/index.html").read_text()
