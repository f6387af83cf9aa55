"""The rules of the house, as far as a program can see them."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODELS = [name for name in ("ssd_mmdet", "ssd_resnet34", "m2det", "fcos") if (ROOT / name).is_dir()]
# A folder has its scripts last: until then only what is there is checked.
TRAINABLE = [name for name in MODELS if (ROOT / name / "train.py").is_file()]
SOURCES = sorted(path for part in ("common", *MODELS) for path in (ROOT / part).rglob("*.py"))
SCRIPTS = sorted(
    path
    for path in [*ROOT.glob("*.sh"), *ROOT.glob("common/**/*.sh"), *ROOT.glob("*/test/*.sh")]
    if ".venv" not in path.parts
)
TRACKED = sorted(
    path
    for part in ("common", "tests", "benchmarks", *MODELS, ".ci")
    for path in (ROOT / part).rglob("*")
    if path.suffix in (".py", ".sh", ".md", ".txt", "")
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


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_keep_to_the_rules(path):
    folder = path.relative_to(ROOT).parts[0]
    assert not imports(path) & (set(MODELS) - {folder})
    # torchvision does not load on an NPU host, torch_npu nowhere else.
    assert not imports(path, everywhere=False) & {"torchvision", "torch_npu", "apex"}
    if path.relative_to(ROOT).parts[:2] != ("common", "npu"):
        assert not imports(path) & {"torch_npu", "apex"}
        assert '"cuda"' not in path.read_text()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_scripts_parse(path):
    subprocess.run(["bash", "-n", path], check=True)


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
    for model in TRAINABLE:
        own = (ROOT / model / "requirements.txt").read_text()
        assert own == (ROOT / "requirements.txt").read_text()


def test_readme_names_both_commands():
    for name in ("README.md", "README.zh-CN.md"):
        text = (ROOT / name).read_text()
        assert "bash quickstart.sh" in text
        assert "bash run_tests.sh" in text


@pytest.mark.slow
@pytest.mark.parametrize("model", TRAINABLE)
def test_a_model_folder_with_common_beside_it_runs_elsewhere(tmp_path, model):
    for part in (model, "common"):
        ignored = shutil.ignore_patterns("__pycache__", "output")
        shutil.copytree(ROOT / part, tmp_path / part, ignore=ignored)
    scripts = ("train.py", "evaluate.py", "demo.py")
    for script in scripts:
        done = subprocess.run(
            [sys.executable, tmp_path / model / script, "--help"],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "--checkpoint" in done.stdout


def test_what_is_tracked_is_source_or_data():
    """No download or build left behind by hand is committed with the rest."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    files = ["git", "ls-files", "--", ".", ":!tests/data", ":!tests/golden"]
    listed = subprocess.run(files, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    kinds = {Path(name).suffix or Path(name).name for name in listed.splitlines()}
    code = {".py", ".sh", ".md", ".txt", ".toml", ".json", ".c", ".cpp", ".h"}
    assert kinds <= code | {"LICENSE", ".gitignore", "run"}, sorted(kinds)
