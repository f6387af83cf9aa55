"""The environment a run stands on: device, ranks, precision, checkpoint files, flags, signals.

Everything that is special to the Ascend NPU lives here and nowhere else.
"""
