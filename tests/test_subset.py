"""`--subset`, `--repeat` and `--balance` in the programs of all models."""

import pytest

from common.errors import UserError
from tests import scripts
from tests.small_models import MODELS, module
from tests.test_own_data import SHORT, SMALL


@pytest.mark.parametrize("model", MODELS)
def test_a_run_on_a_balanced_subset_says_so_and_is_resumed_with_it(model, tmp_path):
    data = scripts.subset(tmp_path / "data", train=8, val=2, classes=["person", "dog"])
    words = [*SMALL[model], *SHORT, f"--data={data}", f"--output_dir={tmp_path}/run", "--kind=perf"]
    more = ["--subset=6", "--repeat=2", "--balance=1"]
    train = module(model, "train").main
    train([*words, *more, "--max_iters=1"])
    log = (tmp_path / "run/train_0.log").read_text()
    assert "--subset 6: 6 of 8 images are trained on (seed 0)" in log
    assert "--balance 1: " in log
    assert "6 images, 2 classes" in log
    with pytest.raises(UserError, match=r"training images \(6 before, 8 now\)"):
        train([*words, *more[1:], "--resume=auto"])
    with pytest.raises(UserError, match=r"balance \(1\.0 before, 0\.0 now\)"):
        train([*words, *more[:2], "--resume=auto"])
    train([*words, *more, "--resume=auto"])
