"""Writing checkpoints in the form of the originals: `python3 -m <model>.weights export`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from common import flags
from common.errors import UserError
from common.npu import checkpoint
from common.npu.weights import named_classes, notes_on_class_names


def export_published(
    argv: Sequence[str] | None,
    module: str,
    layouts: Sequence[str],
    recipes: Mapping[str, object],
    recipe_of_checkpoint: Callable[[object, Mapping], object],
    published_file: Callable[[Mapping, str, object], dict],
) -> None:
    """Read the command line of `python3 -m MODULE export FILE OUT`, and write OUT.

    `published_file` gives the content of a checkpoint in one of the `layouts`, of which the first
    is the default. What FILE does not say of its network, the flags of the recipe do. Raise
    UserError where they contradict FILE, and where that is not a whole detector.
    """
    parser = flags.make_parser("Write a checkpoint in the form of the original's.", recipes=recipes)
    parser.prog = f"python3 -m {module}"
    parser.add_argument("command", choices=["export"])
    parser.add_argument("file", metavar="FILE", help="checkpoint of train.py, or another detector")
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write")
    flags.add(parser, "--layout", layouts[0], "whose form to write", choices=tuple(layouts))
    args = parser.parse_args(argv)
    state = checkpoint.load(args.file)
    is_there = args.out.exists()
    if is_there and args.out.samefile(args.file):
        raise UserError(f"{args.out}: is the checkpoint that is read", "give OUT another name")
    recipe = recipe_of_checkpoint(flags.chosen_recipe(args, recipes), state)
    recipe = flags.require_agreement(args, recipe, state)
    content = published_file(state, args.layout, recipe)
    checkpoint.save(args.out, content)
    written_names = named_classes(content)
    if written_names is not None:
        for line in notes_on_class_names(state, written_names):
            print(line)
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
