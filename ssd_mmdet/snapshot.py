"""What a checkpoint of a run holds, and how a run goes on from it exactly."""

import dataclasses

import torch

from common.errors import UserError
from ssd_mmdet.weights import load_weights, published_state_dict


def take(run) -> dict | None:
    """The state of a `train.Training`, on the main rank (None elsewhere); all ranks must call it.

    Raises UserError where a weight is not finite.
    """
    windows = run.ranks.all_gather_objects(run.window.state_dict())
    if not run.ranks.main:
        return None
    weights = published_state_dict(run.model)
    if not all(torch.isfinite(value).all() for value in weights.values()):
        raise UserError("weights are not finite; use --loss_scale=dynamic or a lower --lr")
    return {
        "model": weights,
        "windows": windows,
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.precision.scaler.state_dict(),
        "iteration": run.iteration,
        "best": run.best,
        "recipe": dataclasses.asdict(run.recipe),
        "classes": list(run.classes),
        "category_ids": list(run.val_set.category_ids),
        "run": identity(run),
    }


def identity(run) -> dict:
    """What must be the same for a resumed run to go on where it was."""
    return {
        "network": f"{run.recipe.name} of width {run.recipe.width:g}",
        "global batch": run.recipe.batch_size * run.ranks.world_size,
        "training images": run.records,
        "seed": run.args.seed,
    }


def restore(run, state: dict) -> None:
    """Put a state into a new run: in mid-epoch, with the same order and augmentation."""
    for what, value in identity(run).items():
        if (was := state["run"].get(what)) != value:
            raise UserError(
                f"--resume {state['path']}: its {what} was {was}, now {value}; "
                "go on as it was, or start anew from its weights with --checkpoint_path"
            )
    load_weights(run.model, state)
    if len(state["windows"]) == run.ranks.world_size:
        run.window.load_state_dict(state["windows"][run.ranks.rank])
    run.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:
        run.precision.scaler.load_state_dict(state["scaler"])
    run.iteration, run.best = state["iteration"], state["best"]
