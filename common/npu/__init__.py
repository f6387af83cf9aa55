"""The environment a run stands on: device, ranks, precision, files, start-up, resume, signals.

Everything that is special to the Ascend NPU lives here and nowhere else.
"""
