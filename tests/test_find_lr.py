"""`--find_lr` in the programs of all recipes, on real images."""

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from common.fps import rate_sweep
from common.fps.rate_sweep import DIVERGED, make_sweep, rising_rates
from tests import scripts
from tests.small_models import ALL, module
from tests.test_batch_search import data, flags_of  # noqa: F401 a fixture

BATCH = "--batch_size=2"


def sweep(model, data, output, *words):  # noqa: F811
    """Run the program; return its exit status."""
    return module(model, "train").main(flags_of(model, data, output, BATCH, "--find_lr", *words))


def rows(printed):
    """The rate and the loss of each row of the table that is printed."""
    numbers = []
    for line in printed.splitlines():
        words = line.removesuffix("lowest").split()
        if len(words) == 3 and words[0][0].isdigit():
            numbers.append([float(words[0]), float(words[1])])
    return np.array(numbers)


@pytest.mark.filterwarnings("ignore:divide by zero")  # of rates that do not rise
@pytest.mark.parametrize("model", ALL)
def test_a_sweep_trains_as_a_run_does_and_leaves_no_trace(
    model,
    data,  # noqa: F811
    tmp_path,
    capsys,
    monkeypatch,
):
    """With the rates of a run its losses are those of the run."""
    output = tmp_path / "run"
    words = flags_of(model, data, output, BATCH, "--max_iters=3")
    module(model, "train").main(words)
    lines = scripts.train_lines(output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    rates = np.array([line["lr"] for line in lines])
    monkeypatch.setattr(rate_sweep, "rising_rates", lambda usual_rate, steps: rates)
    capsys.readouterr()
    assert sweep(model, data, output, "--max_iters=3") is None
    printed = capsys.readouterr().out
    expected = [[line["lr"], line["loss"]] for line in lines]
    np.testing.assert_allclose(rows(printed), expected, rtol=6e-3)
    losses = np.array(expected)[:, 1]
    np.testing.assert_allclose(rows(printed)[:, 1], losses, rtol=6e-4)
    after = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    picture = output / "find_lr.png"
    assert set(after) - set(before) == {picture}
    assert {path: after[path] for path in before} == before
    with Image.open(picture) as opened:
        assert opened.width > 700
    assert f"written: {picture}" in printed


@pytest.mark.parametrize("model", ALL)
def test_the_flags_of_the_suggestion_give_its_rate(model):
    for recipe in module(model, "config").RECIPES.values():
        for world_size, batch_size in ((1, 3), (8, 16)):
            flags = recipe.lr_flags(0.00123, world_size, batch_size).split()
            changes = {}
            for flag in flags:
                name, value = flag.removeprefix("--").split("=")
                changes[name] = float(value)
            changed = type(recipe)(**{**vars(recipe), **changes})
            assert changed.base_lr(world_size, batch_size) == pytest.approx(0.00123, rel=0.05)


def test_the_suggestion_is_a_tenth_of_the_rate_with_the_lowest_loss():
    rates = rising_rates(0.01, 200)
    assert rates[0] == pytest.approx(1e-5)
    assert rates[-1] == pytest.approx(1)
    # Falls most at 0.003, is lowest at 0.1, and diverges after that.
    position = np.log10(rates)
    losses = 5 - 3 / (1 + np.exp(-3 * (position - np.log10(0.003)))) + np.exp(9 * (position + 0.5))
    noise = np.random.default_rng(0).normal(0, 0.1, len(rates))
    made = make_sweep(rates, list(losses + noise))
    lowest = rates[losses.argmin()]
    assert made.suggestion == pytest.approx(lowest / 10, rel=0.3)
    assert made.steepest == pytest.approx(0.003, rel=0.5)
    assert len(made.smoothed) == 200


def test_nothing_is_suggested_where_the_loss_does_not_fall():
    rates = rising_rates(0.01, 60)
    assert make_sweep(rates, [3.0] * 40).suggestion is None
    assert make_sweep(rates, list(np.linspace(3, 9, 50))).suggestion is None


def test_a_sweep_ends_where_training_diverges(data, tmp_path, capsys, monkeypatch):  # noqa: F811
    # From an eighth of the recipe's rate on, each rate is eight times the one before.
    rates = 0.01 * 8.0 ** np.arange(40)
    monkeypatch.setattr(rate_sweep, "rising_rates", lambda usual_rate, steps: rates[:steps])
    sweep("ssd_mmdet", data, tmp_path / "run", "--max_iters=40")
    printed = capsys.readouterr().out
    found = rows(printed)
    assert len(found) < 40
    losses = found[:, 1]
    assert np.isfinite(losses).all()
    assert losses[-1] > DIVERGED * losses.min() or len(found) < 12
    assert "no suggestion: the loss has hardly fallen" in printed or "suggestion: --lr=" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--look=1"], r"^--find_lr: not with --look, --replay or --profile; omit one of them"),
        (["--profile=1"], r"^--find_lr: not with --look, --replay or --profile; omit one of them"),
        (["--resume=iter_3.pt"], r"^--find_lr: begins with the weights of a new run; omit --resu"),
    ],
)
def test_a_sweep_beside_something_else_is_refused(words, message, data, tmp_path):  # noqa: F811
    with pytest.raises(UserError, match=message):
        sweep("ssd_mmdet", data, tmp_path / "run", *words)


def test_a_sweep_of_two_ranks(data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(scripts, "MODEL", scripts.ROOT / "fcos")
    output = tmp_path / "run"
    words = flags_of("fcos", data, output, BATCH, "--find_lr", "--max_iters=2")
    done = scripts.run("train.py", *words, ranks=2)
    assert "--find_lr: 2 steps with rates from" in done.stdout
    assert f"written: {output}/find_lr.png" in done.stdout
    assert [path.name for path in output.iterdir()] == ["find_lr.png"]
