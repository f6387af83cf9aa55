"""The parser of all programs: argparse with errors of one line and the liberties of old commands.

This module needs the standard library only, so that a program without torch can use it.
"""

import argparse
import re
import sys

# Flags for which -1 has a meaning, and those of which there must be one at least; all other numbers
# are at least 0.
MAY_BE_MINUS_ONE = ("num_workers", "local_rank")
AT_LEAST_ONE = ("batch_size", "eval_batch_size")
MAX_INTEGER = 2**63
INDEXED_DEVICE = re.compile(r"(npu|cuda):(\d+)")


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line and three liberties of the old scripts.

    `--batch_size` and `--batch-size` are the same flag, `--device npu:1` is
    `--device npu --device_id 1`, and `--steps=3,5` is `--steps 3 5`.
    """

    def parse_args(self, argv=None, namespace=None):
        words = sys.argv[1:] if argv is None else list(argv)
        words = [_with_dashes(word) for word in words]
        words = _split_device_index(words)
        words = self._split_lists(words)
        args = super().parse_args(words, namespace)
        self._check_ranges(args)
        return args

    def error(self, message: str):
        self.exit(2, f"error: {message} (--help lists the flags)\n")

    def _split_lists(self, words: list[str]) -> list[str]:
        """Split `--steps=3,5` into three words; commas in lists of texts belong to the texts."""
        list_flags = set()
        for action in self._actions:
            if action.nargs == "*" and action.type is not str:
                list_flags.update(action.option_strings)
        split = []
        for word in words:
            name, _, values = word.partition("=")
            if name in list_flags:
                split.append(name)
                split.extend(value for value in re.split("[, ]", values) if value)
            else:
                split.append(word)
        return split

    def _check_ranges(self, args: argparse.Namespace) -> None:
        for name, value in vars(args).items():
            if not isinstance(value, int | float):
                continue
            least = 0
            if name in MAY_BE_MINUS_ONE:
                least = -1
            elif name in AT_LEAST_ONE:
                least = 1
            limit = MAX_INTEGER if isinstance(value, int) else float("inf")
            if not least <= value < limit:
                self.error(f"--{name} {value}: must be at least {least} and below {limit}")


def _with_dashes(word: str) -> str:
    """Write `--batch_size=a_b` with dashes, in the name only."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _split_device_index(words: list[str]) -> list[str]:
    """Write `--device=npu:1` and `--device npu:1` as `--device npu --device-id 1`."""
    split = []
    previous = ""
    for word in words:
        match = None
        if word.startswith("--device="):
            match = INDEXED_DEVICE.fullmatch(word.removeprefix("--device="))
            if match:
                split.append("--device")
        elif previous == "--device":
            match = INDEXED_DEVICE.fullmatch(word)
        if match:
            kind, index = match.groups()
            split += [kind, "--device-id", index]
        else:
            split.append(word)
        previous = word
    return split
