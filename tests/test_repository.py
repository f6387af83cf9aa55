"""The rules of CONTRIBUTING.md, as far as a program can see them."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[1]
MODELS = ["ssd_mmdet", "ssd_resnet34", "m2det", "fcos"]
ENTRY_SCRIPTS = ["train.py", "evaluate.py", "demo.py"]
SOURCES = sorted(path for part in ("common", *MODELS) for path in (ROOT / part).rglob("*.py"))
SCRIPTS = sorted(
    path
    for path in [*ROOT.glob("*.sh"), *ROOT.glob("common/**/*.sh"), *ROOT.glob("*/test/*.sh")]
    if ".venv" not in path.parts
)
LAUNCH_SCRIPTS = [
    path for path in SCRIPTS if path.parent.name == "test" and path.name != "env_npu.sh"
]
TRACKED = sorted(
    path
    for part in ("common", "tests", "benchmarks", "docs", *MODELS, ".ci", ".github")
    for path in (ROOT / part).rglob("*")
    if path.suffix in (".py", ".sh", ".md", ".txt", ".yml", "")
    and path.is_file()
    and not {"__pycache__", "output", "data"} & set(path.parts)
) + sorted([*ROOT.glob("*.md"), *ROOT.glob("*.sh"), *ROOT.glob("*.txt"), *ROOT.glob("*.toml")])


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_ruff(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def imports(path: Path, everywhere: bool = True) -> set[str]:
    """Top-level packages that a module imports; `everywhere=False`: when it is itself imported."""
    tree = ast.parse(path.read_text())
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    found = set()
    for node in ast.walk(tree):
        if not everywhere and node in inside:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def device_names(path: Path) -> list[str]:
    """Places in which a module names an accelerator or its backend, or compares a device's type."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and node.value in ("cuda", "npu", "nccl", "hccl"):
            found.append(f"{path.name}:{node.lineno}: {node.value!r}")
        if isinstance(node, ast.Attribute) and node.attr in ("cuda", "npu", "is_cuda", "is_npu"):
            found.append(f"{path.name}:{node.lineno}: .{node.attr}")
        if isinstance(node, ast.Compare) and ast.unparse(node.left).endswith("device.type"):
            found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_keep_to_the_rules(path):
    folder = path.relative_to(ROOT).parts[0]
    assert not imports(path) & (set(MODELS) - {folder})
    # torchvision does not load on an NPU host, torch_npu nowhere else.
    assert not imports(path, everywhere=False) & {"torchvision", "torch_npu", "apex"}
    if path.relative_to(ROOT).parts[:2] != ("common", "npu"):
        assert not imports(path) & {"torch_npu", "apex"}
        assert not device_names(path)


@pytest.mark.parametrize("model", MODELS)
def test_a_model_has_its_entry_scripts(model):
    missing = [name for name in ENTRY_SCRIPTS if not (ROOT / model / name).is_file()]
    assert not missing


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_scripts_parse(path):
    subprocess.run(["bash", "-n", path], check=True)


COMMANDS = ("quickstart.sh", "run_tests.sh", "download_dataset.sh", "download_weights.sh")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_script_names_it_and_does_nothing_else(tmp_path, name):
    done = subprocess.run(
        ["bash", ROOT / name, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert f"bash {name}" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("path", LAUNCH_SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_help_of_a_launch_script_says_its_purpose_and_flags(path):
    # The program's own --help is left out: `true` stands for the interpreter.
    done = subprocess.run(
        ["bash", path, "--help"],
        env={**os.environ, "PYTHON": "true"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    purpose, heading, *_ = done.stdout.splitlines()
    assert f"# {purpose}" in path.read_text().splitlines()
    assert heading.startswith("Flags of all launch scripts")
    for flag in ("--data_path=", "--device_id=", "--batch_size=", "--nnodes="):
        assert flag in done.stdout


def test_no_machine_path_and_no_index_address():
    address = re.compile(r"/root/|/work/|https?://[^\s)]*(pypi|pythonhosted|simple/|mirror)")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in TRACKED
        if path.name != Path(__file__).name
        for number, line in enumerate(path.read_text(errors="ignore").splitlines(), 1)
        if address.search(line)
    ]
    assert not found


def test_requirements_agree():
    for model in MODELS:
        own = (ROOT / model / "requirements.txt").read_text()
        assert own == (ROOT / "requirements.txt").read_text()


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def package_names(requirements: list[str]) -> set[str]:
    lines = [line for line in requirements if line and not line.startswith("#")]
    return {re.split(r"[=<>;\s]", line)[0] for line in lines}


def test_an_installation_brings_what_the_requirements_name():
    metadata = project()["project"]
    pinned = package_names((ROOT / "requirements.txt").read_text().splitlines())
    assert package_names(metadata["dependencies"]) == pinned
    pinned = package_names((ROOT / "requirements-dev.txt").read_text().splitlines())
    assert package_names(metadata["optional-dependencies"]["dev"]) == pinned


def test_an_installation_brings_every_package():
    initialisers = [
        path for part in ("common", *MODELS) for path in (ROOT / part).rglob("__init__.py")
    ]
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in initialisers}
    assert set(project()["tool"]["setuptools"]["packages"]) == packages


def test_ci_runs_the_command_of_the_readme():
    assert "run: bash .ci/run\n" in (ROOT / ".github/workflows/ci.yml").read_text()
    assert "bash run_tests.sh" in (ROOT / ".ci/run").read_text()


def test_every_photograph_has_its_licence_and_source():
    entries = {}
    for block in re.split(r"\n(?=\S)", (ROOT / "tests/data/NOTICE").read_text()):
        name, *details = block.split("\n")
        entries[name] = [line.strip() for line in details]
    for folder in ("train2017", "val2017"):
        annotations = ROOT / f"tests/data/tiny_coco/annotations/instances_{folder}.json"
        content = json.loads(annotations.read_text())
        licences = {licence["id"]: licence for licence in content["licenses"]}
        files = {path.name for path in (ROOT / "tests/data/tiny_coco" / folder).iterdir()}
        assert files == {image["file_name"] for image in content["images"]}
        for image in content["images"]:
            licence = licences[image["license"]]
            address = licence["url"].replace("\\/", "/")
            assert entries[f"{folder}/{image['file_name']}"][:3] == [
                f"{licence['name']}, {address}",
                image["flickr_url"],
                image["coco_url"],
            ]


DOCUMENTS = [path for path in TRACKED if path.suffix == ".md"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    files = [target.split("#")[0] for target in targets if "://" not in target]
    missing = [file for file in files if file and not (path.parent / file).exists()]
    assert not missing


def test_readme_names_both_commands():
    for name in ("README.md", "README.zh-CN.md"):
        text = (ROOT / name).read_text()
        assert "bash quickstart.sh" in text
        assert "bash run_tests.sh" in text


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_a_model_folder_with_common_beside_it_runs_elsewhere(tmp_path, model):
    for part in (model, "common"):
        ignored = shutil.ignore_patterns("__pycache__", "output")
        shutil.copytree(ROOT / part, tmp_path / part, ignore=ignored)
    # All scripts in one process, whose start takes longer than they do.
    program = """
import runpy, sys
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 0, script
    print("end of", script)
"""
    scripts = [str(tmp_path / model / script) for script in ENTRY_SCRIPTS]
    done = subprocess.run(
        [sys.executable, "-c", program, *scripts],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    *helps, _ = done.stdout.split("end of ")
    assert len(helps) == len(scripts)
    assert all("--checkpoint" in text for text in helps)
