import math

import pytest
import torch

from common.fps.window import LossWindow

NAMES = ("loss_cls", "loss_bbox", "loss")
NAN, INF = float("nan"), float("inf")


def window():
    return LossWindow(NAMES, torch.device("cpu"))


def add(window, step, *values):
    losses = {name: torch.tensor(value) for name, value in zip(NAMES, values, strict=True)}
    window.add(step, losses, torch.tensor([10 * step, 10 * step + 1]))


def test_means_of_each_window():
    w = window()
    for step in range(4):
        add(w, step, float(step), 2.0 * step, 3.0 * step)
    assert w.steps == 4
    assert w.fetch().means() == {"loss_cls": 1.5, "loss_bbox": 3.0, "loss": 4.5}
    assert w.first_not_finite() is None
    add(w, 4, 10.0, 20.0, 30.0)  # looking at a window does not end it
    assert w.fetch().means() == {"loss_cls": 3.2, "loss_bbox": 6.4, "loss": 9.6}


def test_nothing_is_wrong_in_a_window_without_steps():
    assert window().fetch().first_not_finite() is None


def test_values_are_detached_copies():
    w, value = window(), torch.tensor(1.0, requires_grad=True)
    w.add(0, dict.fromkeys(NAMES, value * 2), torch.tensor([1]))
    state = w.state_dict()
    assert not state["figures"].requires_grad
    assert w.fetch().means()["loss"] == 2


def test_half_precision_is_summed_in_fp32():
    w = window()
    for step in range(300):
        w.add(step, dict.fromkeys(NAMES, torch.tensor(1.0).bfloat16()), torch.tensor([1]))
    assert w.fetch().means()["loss"] == 1


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_the_first_bad_step_is_latched(value):
    w = window()
    add(w, 100, 1.0, 1.0, 2.0)
    add(w, 101, 1.0, value, value)
    add(w, 102, NAN, 1.0, NAN)
    add(w, 103, 1.0, 1.0, 2.0)
    found = (101, "loss_bbox", [1010, 1011])
    assert w.fetch().first_not_finite() == found
    assert w.fetch().first_not_finite() == found  # looking changes nothing
    assert not math.isfinite(w.means()["loss"])


def test_the_earliest_term_is_named_and_a_part_before_the_total():
    w = window()
    add(w, 0, 1.0, 1.0, INF)  # an overflow of the sum alone
    add(w, 1, NAN, NAN, NAN)
    assert w.fetch().first_not_finite() == (0, "loss", [0, 1])
    w = window()
    add(w, 7, NAN, NAN, NAN)
    assert w.fetch().first_not_finite() == (7, "loss_cls", [70, 71])


def test_a_resumed_window_goes_on_where_it_was():
    whole, first = window(), window()
    for step in range(3):
        add(whole, step, 1.5 * step, 1.0, 2.0)
        add(first, step, 1.5 * step, 1.0, 2.0)
    state = first.state_dict()
    resumed = window()
    resumed.load_state_dict(state)
    add(first, 99, 1e6, 1e6, 1e6)  # the state is a copy
    for w in (whole, resumed):
        for step in (3, 4):
            add(w, step, 1.5 * step, 7.0, 2.0)
    assert resumed.steps == whole.steps == 5
    assert resumed.fetch().means() == whole.fetch().means()


def test_a_bad_step_after_a_resume_has_its_own_number():
    first, w = window(), window()
    for step in range(4):
        add(first, step, 1.0, 1.0, 1.0)
    w.load_state_dict(first.state_dict())
    add(w, 4, 1.0, 1.0, 1.0)
    assert w.fetch().first_not_finite() is None
    add(w, 5, 1.0, NAN, NAN)
    assert w.fetch().first_not_finite() == (5, "loss_bbox", [50, 51])
