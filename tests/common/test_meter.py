from contextlib import suppress

from hypothesis import given, settings
from hypothesis import strategies as st

from common.fps.meter import Meter


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def run(meter, clock, steps, seconds, data=0.0):
    for _ in range(steps):
        clock.now += seconds
        meter.step(data)


def test_warmup_is_left_out_of_the_average_and_counted_in_its_window():
    clock = Clock()
    meter = Meter(32, warmup_steps=5, clock=clock)
    run(meter, clock, 5, 2.0, data=1.5)
    run(meter, clock, 5, 0.5, data=0.125)
    window = meter.window()
    assert (window.steps, window.time) == (10, 1.25)
    assert window.data_time == (5 * 1.5 + 5 * 0.125) / 10
    assert window.fps == 10 * 32 / 12.5
    assert window.fps_average == 5 * 32 / 2.5
    assert not window.warming_up


def test_windows_are_disjoint_and_the_average_runs_on():
    clock = Clock()
    meter = Meter(8, warmup_steps=2, clock=clock)
    run(meter, clock, 4, 1.0)
    meter.window()
    run(meter, clock, 2, 0.25, data=0.125)
    window = meter.window()
    assert (window.steps, window.time, window.data_time) == (2, 0.25, 0.125)
    assert window.fps == 32
    assert window.fps_average == meter.fps_average == 4 * 8 / 2.5


def test_a_run_shorter_than_the_warmup_counts_all_its_steps_and_is_marked():
    clock = Clock()
    meter = Meter(4, warmup_steps=20, clock=clock)
    run(meter, clock, 20, 0.5)
    window = meter.window()
    assert window.warming_up
    assert window.fps_average == window.fps == 8
    run(meter, clock, 1, 0.25)
    assert meter.fps_average == 16
    assert not meter.window().warming_up


def test_the_device_catches_up_with_its_warmup_at_a_window():
    clock = Clock()
    meter = Meter(1, warmup_steps=2, clock=clock)
    run(meter, clock, 2, 0.0)  # issued at once, still running on the device
    clock.now += 10
    meter.window()
    run(meter, clock, 2, 1.0)
    assert meter.fps_average == 1


def test_pauses_are_in_no_figure_even_nested_or_left_by_an_exception():
    clock = Clock()
    meter = Meter(2, warmup_steps=1, clock=clock)
    run(meter, clock, 2, 1.0)
    with meter.paused():
        clock.now += 100
        with meter.paused():
            clock.now += 50
    with suppress(KeyError), meter.paused():
        clock.now += 7
        raise KeyError
    run(meter, clock, 2, 1.0)
    window = meter.window()
    assert (window.time, window.fps, window.fps_average) == (1, 2, 2)


def test_the_formula_names_what_counts():
    formula = Meter(64, warmup_steps=7).formula
    for words in ("all ranks (64 a step)", "loader wait included", "evaluation", "first 7 steps"):
        assert words in formula


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 999), st.integers(0, 999), st.booleans()), min_size=1),
    st.integers(0, 12),
)
def test_average_is_the_formula_whatever_the_windows_and_pauses(steps, warmup):
    clock = Clock()
    meter = Meter(3, warmup_steps=warmup, clock=clock)
    for seconds, pause, closes in steps:
        clock.now += seconds
        meter.step(0.0)
        if closes:
            meter.window()
        with meter.paused():
            clock.now += pause
    counted = [seconds for seconds, _, _ in steps]
    if len(counted) > warmup:
        counted = counted[warmup:]
    assert meter.fps_average == 3 * len(counted) / sum(counted)


def test_seconds_that_are_left_out_are_in_no_speed():
    clock = Clock()
    meter = Meter(8, warmup_steps=1, clock=clock)
    run(meter, clock, 1, 1.0)
    clock.now += 41.0  # of which 40 were spent compiling
    meter.leave_out(40.0)
    meter.step(0.0)
    window = meter.window()
    assert window.time == 1.0
    assert window.fps == window.fps_average == 8
