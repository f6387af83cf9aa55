"""Measuring a run: throughput meter, run log, summary, calc_fps and training curves."""
