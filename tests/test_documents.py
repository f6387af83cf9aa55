"""The commands that documents tell users to run, with the programs of others."""

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
