"""The parser of all programs: argparse with errors of one line and the liberties of old commands.

This module needs the standard library only, so that a program without torch can use it.
"""

import argparse
import re
import sys
from collections.abc import Mapping
from typing import NamedTuple

from common import __version__
from common.config_file import flags_of_config, words_of_flag

# Flags for which -1 has a meaning, and those of which there must be one at least; all other numbers
# are at least 0.
MAY_BE_MINUS_ONE = ("num_workers", "local_rank", "eval_interval")
AT_LEAST_ONE = ("batch_size", "eval_batch_size", "epoch", "repeat", "accumulate")
# Flags that are off where they are not given: whoever gives one means a number.
AT_LEAST_ONE_IF_GIVEN = ("look", "replay", "profile")
MAX_INTEGER = 2**63
INDEXED_DEVICE = re.compile(r"(npu|cuda):(\d+)")


# What an old command gives as a positional: MMDetection's CONFIG and CHECKPOINT.
CONFIG_SUFFIX = ".py"
CONFIG_FLAG = "--config"
PRESET_FLAG = "--recipe"
# Of files that are read as checkpoints, and of other weights, which get a line of their own.
CHECKPOINT_SUFFIXES = (
    # PyTorch's, and the ones that this project gives
    ".pth",
    ".pt",
    ".pt2",
    ".bin",
    ".safetensors",
    ".superseded",
    # NumPy's, pickles and archives
    ".npz",
    ".npy",
    ".pkl",
    ".pickle",
    ".zip",
    ".tar",
    ".gz",
    ".tgz",
    # Of other frameworks
    ".onnx",
    ".ckpt",
    ".index",
    ".meta",
    ".pb",
    ".tflite",
    ".h5",
    ".hdf5",
    ".keras",
    ".weights",
    ".caffemodel",
    ".params",
    ".pdparams",
    ".mindir",
    ".air",
    ".om",
)
TENSORFLOW_DATA = re.compile(r".*\.data-\d+-of-\d+")


def is_checkpoint_name(name: str) -> bool:
    """Return whether a file's name is one that weights have, of PyTorch or of another framework."""
    name = name.lower()
    return name.endswith(CHECKPOINT_SUFFIXES) or TENSORFLOW_DATA.fullmatch(name) is not None


class OldFlag(NamedTuple):
    """A flag of the programs that these ones replace, written with dashes.

    With `new` it works: that flag takes its value, or is taken as it is where it has one of its own
    (`--kind=perf`). With an empty `new` it asks for what happens anyway and is left out. Without it
    the program ends with `advice`.
    """

    name: str
    new: str | None = None
    advice: str = ""
    value: str | None = None  # with this value only; "": without any; None: whatever follows
    takes_value: bool = False  # the next word belongs to it where there is no "="


def renamed(names: str, new: str, value: str | None = None) -> list[OldFlag]:
    """Return old flags, separated by spaces, that are called `new` today."""
    return [OldFlag(name, new, value=value) for name in names.split()]


def needless(names: str, value: str | None = None, takes_value: bool = False) -> list[OldFlag]:
    """Return old flags, separated by spaces, that ask for what happens anyway."""
    return [OldFlag(name, "", value=value, takes_value=takes_value) for name in names.split()]


def answered(names: str, advice: str, value: str | None = None) -> list[OldFlag]:
    """Return old flags, separated by spaces, of which `advice` says what to do instead."""
    return [OldFlag(name, advice=advice, value=value) for name in names.split()]


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line and the liberties of old commands.

    `--batch_size` and `--batch-size` are the same flag, `--device npu:1` is
    `--device npu --device_id 1`, `--steps=3,5` is `--steps 3 5`, and `old_flags` work or are
    answered. With `reads_config` the flags of the file that `--config` names come before those of
    the command line, which count more. `preset_helps` has, by the name of a preset, the texts of
    `--help` that show its defaults, by the names of the flags. The parsed arguments have `command`,
    the words that start this process, and `given`, the values of the flags that it gives by their
    names.
    """

    old_flags: tuple[OldFlag, ...] = ()
    reads_config = False
    preset_helps: Mapping[str, Mapping[str, str]] = {}

    def __init__(self, **options):
        super().__init__(**options)
        text = f"onestage {__version__}"
        self.add_argument(
            "--version", action="version", version=text, help="print the version and exit"
        )

    def parse_args(self, argv=None, namespace=None):
        words = sys.argv[1:] if argv is None else list(argv)
        command = (sys.executable, sys.argv[0], *words)
        words = [_with_dashes(word) for word in words]
        if self.reads_config:
            words = [*self._words_of_config(words), *words]
        words = self._replace_old_flags(words)
        words = _split_device_index(words)
        words = self._split_lists(words)
        self._show_defaults_of(_last_value(words, PRESET_FLAG))
        args, unknown_words = self.parse_known_args(words, namespace)
        if unknown_words:
            self.error(explain_unknown(unknown_words))
        if self.reads_config and args.config.endswith(CONFIG_SUFFIX):
            self.error(explain_unknown([args.config]))
        args.command = command
        args.given = self._given_flags(words)
        self._check_ranges(args)
        return args

    def error(self, message: str):
        self.exit(2, f"error: {message} (--help lists the flags)\n")

    def format_help(self) -> str:
        """Return the help; its first line names what is no flag, and not each flag once more."""
        words = ["%(prog)s"]
        for action in self._actions:
            if not action.option_strings:
                word = action.metavar or action.dest
                words.append(f"[{word} ...]" if action.nargs == "*" else word)
        self.usage = " ".join([*words, "[--flag=value ...]"])
        return super().format_help()

    def _show_defaults_of(self, preset: str) -> None:
        """Let `--help` show the defaults of a preset, if there is one of this name."""
        helps = self.preset_helps.get(preset, {})
        for action in self._actions:
            action.help = helps.get(action.dest, action.help)

    def _words_of_config(self, words: list[str]) -> list[str]:
        """Return the flags of the file that `--config` names, as words of a command line.

        A Python file, as MMDetection's programs take it, is answered like other old words.
        """
        path = _last_value(words, CONFIG_FLAG)
        if not path or path.endswith(CONFIG_SUFFIX):
            return []
        words_of_config = []
        for name, value in flags_of_config(path).items():
            flag_words = words_of_flag(path, name, value)
            flag = flag_words[0].partition("=")[0]
            is_old = any(old.name == flag for old in self.old_flags)
            if not is_old and not self._has_flag(flag):
                self.error(f"--config {path}: there is no flag {name}")
            words_of_config += flag_words
        return words_of_config

    def _given_flags(self, words: list[str]) -> dict[str, object]:
        """Return the values of the flags in these words by their names, without `--config`."""
        not_given = object()
        names = [action.dest for action in self._actions]
        values = argparse.Namespace(**dict.fromkeys(names, not_given))
        self.parse_known_args(words, values)
        given = {}
        for name in names:
            value = getattr(values, name)
            if value is not not_given and f"--{name}" != CONFIG_FLAG:
                given[name] = value
        return given

    def _replace_old_flags(self, words: list[str]) -> list[str]:
        """Write the flags of old commands as today's; end the program where there is none."""
        replaced = []
        answers = []
        remaining = list(words)
        while remaining:
            word = remaining.pop(0)
            name, equals, value = word.partition("=")
            value_is_next = not equals and remaining and not remaining[0].startswith("-")
            if value_is_next:
                value = remaining[0]
            old = self._find_old_flag(name, value)
            if old is None:
                replaced.append(word)
            elif old.new is None:
                answers.append(f"{word}: {old.advice}")
            elif old.new == "":
                if value_is_next and (old.takes_value or old.value):
                    remaining.pop(0)
            elif "=" in old.new:
                replaced.append(old.new)
            else:
                replaced.append(old.new + word.removeprefix(name))
        if answers:
            self.error("; ".join(answers))
        return replaced

    def _find_old_flag(self, name: str, value: str) -> OldFlag | None:
        """Return the old flag of this name, None where the program has a flag of that name.

        One that is old with certain values only may have the name of a flag of today.
        """
        for old in self.old_flags:
            if old.name != name:
                continue
            if old.value is None:
                # Nothing of today takes a Python file.
                matches = not self._has_flag(name) or value.endswith(CONFIG_SUFFIX)
            else:
                matches = old.value == value
            if old.new:
                matches = matches and self._has_flag(old.new.partition("=")[0])
            if matches:
                return old
        return None

    def _has_flag(self, name: str) -> bool:
        return any(name in action.option_strings for action in self._actions)

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
            elif name in AT_LEAST_ONE or (name in AT_LEAST_ONE_IF_GIVEN and name in args.given):
                least = 1
            limit = MAX_INTEGER if isinstance(value, int) else float("inf")
            if not least <= value < limit:
                self.error(f"--{name} {value}: must be at least {least} and below {limit}")


def explain_unknown(words: list[str]) -> str:
    """Return what to do about words that the parser has no use for, in one line."""
    for word in words:
        if word.startswith("-"):
            continue
        if word.endswith(CONFIG_SUFFIX):
            return (
                f"{word}: no config file is read; --recipe takes a preset by its name, each of its "
                "numbers has a flag, and --checkpoint takes weights"
            )
        if is_checkpoint_name(word):
            return f"{word}: write --checkpoint={word}"
    return f"unrecognized arguments: {' '.join(words)}"


def _last_value(words: list[str], flag: str) -> str:
    """Return the last value that a flag gets in the words of a command line, "" without one."""
    value = ""
    for position, word in enumerate(words):
        if word == flag and position + 1 < len(words):
            value = words[position + 1]
        elif word.startswith(f"{flag}="):
            value = word.removeprefix(f"{flag}=")
    return value


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
