"""Writing checkpoints in the form of the originals: `python3 -m <model>.weights export`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from common import flags
from common.errors import UserError
from common.npu import checkpoint


def export_published(
    argv: Sequence[str] | None,
    module: str,
    layouts: Sequence[str],
    published_file: Callable[[Mapping, str], dict],
) -> None:
    """Read the command line of `python3 -m MODULE export FILE OUT`, and write OUT.

    `published_file` gives the content of a checkpoint in one of the `layouts`, of which the first
    is the default. Raise UserError where FILE is not a whole detector.
    """
    parser = flags.Parser(prog=f"python3 -m {module}", allow_abbrev=False)
    parser.description = "Write a checkpoint in the form of the original's."
    parser.add_argument("command", choices=["export"])
    parser.add_argument("file", metavar="FILE", help="checkpoint of train.py, or another detector")
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write")
    flags.add(parser, "--layout", layouts[0], "whose form to write", choices=tuple(layouts))
    args = parser.parse_args(argv)
    is_there = args.out.exists()
    if is_there and args.out.samefile(args.file):
        raise UserError(f"{args.out}: is the checkpoint that is read", "give OUT another name")
    content = published_file(checkpoint.load(args.file), args.layout)
    checkpoint.save(args.out, content)
    replaced = ", in place of a former file" if is_there else ""
    print(f"{args.out}: {args.file} in the form of {args.layout}{replaced}")


def mmdetection_file(
    weights: Mapping[str, Tensor], class_names: Sequence[str], layout: str, model: str
) -> dict:
    """Return the content of a checkpoint of MMDetection: 2.x reads `CLASSES`, 3.x `dataset_meta`.

    `layout` is "mmdet2" or "mmdet3". `written_by`, which MMDetection does not read, is the `model`
    of this repository.
    """
    meta = {"CLASSES": tuple(class_names)}
    if layout == "mmdet3":
        meta["dataset_meta"] = {"classes": tuple(class_names)}
    return {"meta": meta, "state_dict": dict(weights), "written_by": model}
