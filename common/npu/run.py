"""A process of a training run: its start, what it stands on, and the state that it saves."""

import dataclasses
import os
import shlex
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from common import __version__, flags
from common.coco.evaluation import EvaluationOptions, require_evaluator
from common.coco.layout import Files
from common.coco.sampling import draw_subset, subset_size
from common.config_file import FLAGS_ENTRY
from common.errors import UserError, one_line
from common.fps.profile import Profile
from common.fps.runlog import RunLog, header_of_step
from common.npu import accumulation, checkpoint, distributed, record
from common.npu.accumulation import Accumulation
from common.npu.background import BackgroundCall
from common.npu.compiling import Compiler, Function
from common.npu.device import (
    be_deterministic,
    be_exact,
    environment,
    in_host_memory,
    memory_mib,
    obstacle_to_fused_sgd,
    setup_device,
    use_one_host_thread,
    versions,
)
from common.npu.distributed import Ranks
from common.npu.ema import WeightAverage, require_decay
from common.npu.entry import StopRequest, as_user_error, full_memory
from common.npu.file_cache import filled_cache
from common.npu.freezing import freeze_stages, number_of_stages, trained_line
from common.npu.loading import workers_per_rank
from common.npu.output import claim_output_folder, renamed_folders
from common.npu.precision import Precision, default_level
from common.npu.sync_bn import synchronise_norms
from common.npu.weights import averages_of, load_same, weights_on_cpu

if TYPE_CHECKING:
    from common.fps.progress import Progress

Records = TypeVar("Records")  # an index of a training set, of annotations or of TFRecord files
# A default interval of steps is longer where the steps are so short that less time would pass.
SECONDS_BETWEEN_LINES = 1.0
SECONDS_BETWEEN_CHECKPOINTS = 180.0
# The fields of a recipe that may differ in a resumed run, which takes the new value. All others,
# which say what is learned from what data, must stay.
MAY_CHANGE = frozenset(
    [
        # The schedule
        "epochs",
        "num_examples_per_epoch",
        "lr",
        "lr_step",
        "lr_decay_epochs",
        "lr_decay_at",
        "lr_decay_factor",
        "lr_factors",
        "lr_last_epochs",
        "lr_warmup_epochs",
        "lr_cosine_epochs",
        "lr_floor",
        "warmup",
        "warmup_epochs",
        "warmup_factor",
        "warmup_kind",
        "warmup_lr",
        "warmup_ratio",
        # The optimizer and the precision
        "bias_lr_factor",
        "momentum",
        "weight_decay",
        "clip_norm",
        "clip_each",
        "amp",
        "loss_scale",
        # The evaluation
        "evaluation",
        "eval_interval",
        "threshold",
        "eval_batch_size",
        "eval_shapes",
        "score_threshold",
        "nms",
        "nms_iou",
        "soft_nms_iou",
        "soft_nms_min_score",
        "hard_nms_iou",
        "candidates",
        "max_per_class",
        "max_detections",
        "plus_one",
        "clamp_boxes",
        # A word in the logs
        "name",
        # Images of a rank: the global batch must stay, and is compared as such
        "batch_size",
    ]
)


class Process(NamedTuple):
    """What every program runs on."""

    ranks: Ranks
    device: torch.device
    reason: str  # why this device was taken


def start_process(
    device_name: str,
    device_id: int,
    timeout_seconds: float,
    deterministic: bool,
    exact: bool,
    card: int | None = None,
) -> Process:
    """Take a device and join the other ranks.

    `device_id` is the card of a single process. Of several each takes the one of its local rank,
    unless `card` names another. `deterministic` asks for the same bits in every run, `exact` for
    float32 with all its bits, which the former includes. Raise UserError where the device cannot be
    used.
    """
    ranks = Ranks.from_environment()
    if card is None:
        card = ranks.card(device_id)
    device, reason = setup_device(device_name, card)
    use_one_host_thread(device)
    if deterministic:
        be_deterministic(device)
    if exact or deterministic:
        be_exact(device)
    distributed.start(device, ranks, timeout_seconds)
    return Process(ranks, device, reason)


def describe_program(
    recipe, command: Sequence[str], device_line: str, precision: Precision, world_size: int
) -> dict[str, object]:
    """Return what `run.json` and a report say of a program: its call, its recipe, the versions."""
    return {
        "folder": os.getcwd(),
        "command": list(command),
        "model": recipe.model,
        "recipe": record.recipe_as_json(recipe),
        "device": device_line,
        "precision": str(precision),
        "ranks": world_size,
        "versions": {"commit": record.commit(), **versions()},
    }


@dataclass(frozen=True)
class RunSettings:
    """What the flags of the group "run" ask for."""

    started: float  # epoch seconds at which the launch script started
    max_iters: int  # 0: no limit
    log_interval: int  # steps
    log_seconds: float  # from one log line to the next at least; 0: no limit
    save_interval: int  # steps; 0: an epoch, at least SECONDS_BETWEEN_CHECKPOINTS of epochs
    keep: int  # checkpoints
    save: bool  # write checkpoints at all
    evaluate: bool  # whether accuracy counts, not only speed
    background_metrics: bool  # compute them in a process while training goes on
    patience: int = 0  # evaluations without a higher AP, after which training ends; 0: never
    subset: str = ""  # train on so many images, or on this share of them; "": on all
    accumulate: int = 1  # parts of a batch that go through the network one after the other
    cache: str = "none"  # ram: keep the bytes of the training set's files in memory
    freeze: str = ""  # "backbone", or the number of its first stages that stay as they are
    ema: float = 0.0  # decay of the average of the weights; 0: none
    sync_bn: bool = False  # batch norm over all ranks
    look: int = 0  # draw this many samples of an epoch, and train nothing
    epoch: int = 1  # that epoch, from 1
    find_batch_size: bool = False  # the batch is not known yet
    find_lr: bool = False  # only try learning rates


class ReplayedStep(NamedTuple):
    """A step whose batch is drawn again, and what the run's log says of the process that did it."""

    number: int  # from 1
    index_of_batch: int  # of the batch in the order of the run, from 0
    world_size: int
    seed: int | None  # None where the log does not say it
    config: str | None  # the recipe's `listing`, None where the log does not say it


@dataclass
class Run:
    """A process of a training run."""

    ranks: Ranks
    device: torch.device
    precision: Precision
    compiler: Compiler
    stop: StopRequest
    log: RunLog
    output_dir: Path
    log_name: int | str  # part of the text log's file name
    tag: str  # put before the experiment's name
    seed: int
    workers: int
    settings: RunSettings
    evaluation_options: EvaluationOptions
    resumed: dict | None  # the checkpoint that the run goes on from
    device_line: str  # what it runs on, and why
    inputs: tuple[str, ...] = ()  # files and folders that the flags name
    command: tuple[str, ...] = ()  # the words of the command line
    # Those given, in it or in the file of --config
    flags: Mapping[str, object] = dataclasses.field(default_factory=dict)
    repeated: Mapping[str, object] | None = None  # the run.json of --config
    replayed: ReplayedStep | None = None  # the step of `--replay`
    profile: Profile | None = None  # of `--profile`
    frozen_stages: int = 0  # of the backbone, by `freeze`
    found_batch_size: int = 0  # by `--batch_size auto`; 0: it is a number
    least_in_part: int = 1  # images that must go through the network together

    @staticmethod
    def start(
        args: Namespace,
        recipe,
        card: int | None = None,
        weights_flag: str = "--checkpoint_path",
    ) -> "Run":
        """Take a device, join the other ranks, and read the state that the run goes on from.

        `recipe` gives the precision and the name; `card` as in `start_process`; `weights_flag` is
        the flag by which a new run takes weights. Nothing of a former run is moved yet:
        `open_output` does that, once all that the run needs has been read.
        """
        ranks, device, reason = start_process(
            args.device, args.device_id, args.timeout, args.deterministic, args.exact, card
        )
        only_draws = args.look > 0 or args.replay > 0
        if args.look and args.replay:
            raise UserError("--look and --replay: each draws other samples", "omit one of them")
        if only_draws and ranks.world_size > 1:
            raise UserError(
                "--look and --replay need one process", "start it with python3, without torchrun"
            )
        evaluation_options = flags.evaluation_options(args)._replace(table=False)
        profile = None
        max_iters = args.max_iters
        if args.profile:
            if args.resume not in ("none", "auto"):
                raise UserError("--profile: the measured run is a new one", "omit --resume")
            profile = Profile(args.profile, device)
            max_iters = profile.num_steps
        if args.find_lr:
            _require_possible_sweep(args)
        if only_draws and args.find_batch_size:
            raise UserError(
                "--batch_size auto: --look and --replay draw batches of a known size",
                "give the number of the run",
            )
        trains = not only_draws and not args.find_lr
        evaluates = args.kind == "acc" and profile is None and trains
        if evaluates:
            require_evaluator(evaluation_options.faster)
        elif args.patience and trains:
            raise UserError(
                f"--patience {args.patience}: this run does not evaluate",
                "omit it, or what leaves the evaluations out",
            )
        stop = StopRequest()
        torch.manual_seed(args.seed)
        if hasattr(args, "amp"):  # the flag was given
            level = args.amp
        else:
            level = default_level(device, recipe.amp)
        precision = Precision(device, level, recipe.loss_scale, args.amp_dtype, args.amp_backend)
        if args.compile and precision.apex is not None:
            raise UserError("--compile: not with --amp_backend apex", "omit one of them")
        if args.accumulate > 1 and precision.apex is not None:
            raise UserError("--accumulate: not with --amp_backend apex", "omit one of them")
        require_decay(args.ema)
        if args.ema and precision.apex is not None:
            raise UserError("--ema: not with --amp_backend apex", "omit one of them")
        if profile is not None:
            precision.backward = profile.measured("backward", precision.backward)
            precision.step = profile.measured("optimizer", precision.step)
        compiler = Compiler(device, args.compile and not only_draws)
        if args.sync_bn and ranks.world_size > 1 and compiler.compiles_networks:
            raise UserError("--sync_bn: not with --compile", "omit one of them")
        workers = workers_per_rank(args.num_workers, ranks)
        log = RunLog(ranks, workers)
        log.info(reason)
        log.info(f"precision: {precision}")
        if profile is not None and args.max_iters:
            log.warning(
                f"--max_iters {args.max_iters} has no effect: --profile {profile.steps} takes "
                f"{profile.num_steps} steps"
            )
        obstacle = obstacle_to_fused_sgd(device)
        if obstacle is not None:
            log.info(f"optimizer: SGD over lists of tensors, not fused: {obstacle}")
        resumed = None
        replayed = None
        if args.replay:
            resumed = checkpoint.load_state_up_to(
                args.replay - 1,
                args.resume,
                args.output_dir,
                recipe.model,
                weights_flag,
                warn=log.warning,
            )
            replayed = _replayed_step(args, resumed)
        elif ranks.main and profile is None and not args.find_lr:
            resumed = _state_to_resume(args, recipe.model, weights_flag, log)
        return Run(
            ranks=ranks,
            device=device,
            precision=precision,
            compiler=compiler,
            stop=stop,
            log=log,
            output_dir=args.output_dir,
            log_name=args.device_id,
            tag=args.tag,
            seed=args.seed,
            workers=workers,
            settings=RunSettings(
                started=args.started,
                max_iters=max_iters,
                log_interval=args.log_interval,
                log_seconds=0.0 if "log_interval" in args.given else SECONDS_BETWEEN_LINES,
                save_interval=args.save_interval,
                keep=args.keep,
                save=args.save and profile is None,
                evaluate=evaluates,
                background_metrics=args.background_metrics,
                patience=args.patience,
                subset=args.subset,
                accumulate=args.accumulate,
                cache=args.cache,
                freeze=args.freeze,
                ema=args.ema,
                sync_bn=args.sync_bn,
                look=args.look,
                epoch=args.epoch,
                find_batch_size=args.find_batch_size,
                find_lr=args.find_lr,
            ),
            evaluation_options=evaluation_options,
            resumed=ranks.from_main(resumed),
            device_line=reason,
            inputs=flags.inputs(args),
            command=args.command,
            flags=args.given,
            repeated=record.read_record(args.config) if args.config else None,
            replayed=replayed,
            profile=profile,
        )

    @property
    def resumed_classes(self) -> tuple[str, ...] | None:
        """The class names of the run that this one goes on from, None for a new run."""
        if self.resumed is None:
            return None
        return tuple(self.resumed["classes"])

    @property
    def only_draws(self) -> bool:
        """Whether `--look` or `--replay` asks for pictures of samples instead of training."""
        return self.settings.look > 0 or self.replayed is not None

    @property
    def drawn_world_size(self) -> int:
        """The number of ranks whose batches `--look` or `--replay` draws."""
        if self.replayed is None:
            return 1
        return self.replayed.world_size

    def replay_command(self, step: int) -> str:
        """Return the command line that draws the batch of a step, from 1, of this run.

        It is that of this process, and may be given in any folder.
        """
        words = [*self.command, f"--replay={step}"]
        if self.found_batch_size:
            words.append(f"--batch_size={self.found_batch_size}")
        if self.ranks.world_size > 1:
            # Launch scripts give the number of devices as --device_id, which names the log then.
            words.append("--device_id=0")
        return f"cd {shlex.quote(os.getcwd())} && {shlex.join(words)}"

    @property
    def goes_on_in_its_folder(self) -> bool:
        """Whether the resumed run lies in the output folder, not in another one."""
        if self.resumed is None:
            return False
        path = Path(self.resumed["path"])
        # The file may be a link out of the folder, or one into it.
        folders = (path.parent.resolve(), path.resolve().parent)
        return self.output_dir.resolve() in folders

    def resumed_identity(self, name: str) -> object:
        """Return one value of the resumed run's `RunState.identity`."""
        return self.resumed["run"][name]

    @property
    def pin_memory(self) -> bool:
        """Whether batches are to lie in pinned memory, from which copies are asynchronous."""
        return not in_host_memory(self.device)

    def log_network_change(self, checkpoint: dict, before, after) -> None:
        """Log in which fields of a recipe a checkpoint's network differs from the requested one."""
        changes = []
        for field in dataclasses.fields(before):
            requested = getattr(before, field.name)
            trained = getattr(after, field.name)
            if requested != trained:
                changes.append(f"{field.name} {trained!r} instead of {requested!r}")
        if changes:
            self.log.info(f"{checkpoint['path']}: its network is trained: {', '.join(changes)}")

    def subset_of(self, records: Records) -> Records:
        """Return those of the training records that `--subset` asks for, drawn by the seed."""
        asked = self.settings.subset
        available = len(records)
        if asked == "" or available == 0:
            return records
        size = subset_size(asked, available)
        self.log.info(
            f"--subset {asked}: {size} of {available} images are trained on (seed {self.seed})"
        )
        return records.subset(draw_subset(size, available, self.seed))

    def fill_cache(self, reader) -> None:
        """With `--cache ram` give a loader's reader what it reads in memory that a host shares.

        `reader` has `extents`, which returns what it reads of files, and `cache`. It comes before
        the workers are started. Raise UserError, on all ranks, where that memory is not there.
        """
        if self.settings.cache == "ram":
            reader.cache = filled_cache(
                reader.extents(), self.ranks, lambda: self.stop.requested, self.log.info
            )

    def freeze(self, model: nn.Module, stages: list[list[nn.Module]], has_weights: bool) -> None:
        """Keep the first stages of the backbone as they are, as many as `--freeze` says.

        It comes before the optimizer is built. Raise UserError where there are not as many, and
        where the network has no weights yet.
        """
        asked = self.settings.freeze
        self.frozen_stages = number_of_stages(asked, len(stages))
        if self.frozen_stages == 0:
            return
        if not has_weights:
            raise UserError(
                f"--freeze {asked}: the weights of the backbone are random",
                "give trained ones with --checkpoint or --pretrained, or omit it",
            )
        freeze_stages(stages[: self.frozen_stages])
        self.log.info(
            f"--freeze {asked}: {self.frozen_stages} of {len(stages)} stages of the backbone stay "
            f"as they are, {trained_line(model)}"
        )

    def synchronise_norms(self, model: nn.Module) -> None:
        """Let batch norms that train see the images of all ranks, where `--sync_bn` asks for it.

        It comes after `freeze`.
        """
        if not self.settings.sync_bn:
            return
        if self.ranks.world_size == 1:
            self.log.info("--sync_bn: has no effect on a single process")
            return
        count = synchronise_norms(model)
        if count == 0:
            self.log.info("--sync_bn: has no effect, this network trains no batch norm")
        else:
            self.log.info(f"--sync_bn: {count} batch norms see the images of all processes")

    def weight_average(self, model: nn.Module) -> WeightAverage:
        """Return what `--ema` makes of the network: its average, or the network itself.

        It comes after `freeze`, and before the network is wrapped.
        """
        decay = self.settings.ema
        if decay and not self.settings.find_lr:
            self.log.info(f"--ema {decay:g}: the averages of the weights are evaluated")
        return WeightAverage(model, decay)

    @contextmanager
    def open_output(
        self, recipe, progress: "Progress", data_files: Iterable[Files] = ()
    ) -> Iterator[RunLog]:
        """Claim the output folder, and begin the log and `run.json` in it, for a `with`.

        A former run in the folder is renamed: everything that this one needs has been read. A run
        that goes on there renames the checkpoints after the one that it was resumed from. What
        `progress` says at the end is written in `run.json`. Raise UserError, on all ranks, where
        the folder cannot be used, or would take `data_files` or what the flags name with it.
        """
        inputs = list(self.inputs)
        for files in data_files:
            inputs += [files.annotation_file, files.image_dir]
        self.ranks.barrier()
        messages = []
        obstacle = None
        if self.ranks.main:
            try:
                messages += claim_output_folder(self.output_dir, self.goes_on_in_its_folder, inputs)
            except UserError as error:
                obstacle = str(error)
        # The others would only say that this rank has ended.
        obstacle = self.ranks.from_main(obstacle)
        if obstacle is not None:
            raise UserError(obstacle)
        if self.ranks.main and self.goes_on_in_its_folder:
            last_step = self.resumed["iteration"]
            for path in checkpoint.set_aside_later(self.output_dir, last_step):
                messages.append(f"{path} is later than the resumed state: set aside")
        self.ranks.barrier()
        first_step = 1
        if self.resumed is not None:
            first_step = self.resumed["iteration"] + 1
        self.log.open(
            self.output_dir, self.log_name, first_step if self.goes_on_in_its_folder else 1
        )
        self.log.header(
            env_info=environment(),
            config=recipe.listing(),
            seed=self.seed,
            exp_name=f"{self.tag}{recipe.name}",
            ranks=self.ranks.world_size,
            first_step=first_step,
        )
        for message in messages:
            self.log.info(message)
        with (
            self.log,
            self._recorded(recipe, progress, inputs),
            self._explained_memory(recipe, progress),
        ):
            yield self.log

    @contextmanager
    def _explained_memory(self, recipe, progress: "Progress") -> Iterator[None]:
        """Say what to lower where a step of a run fills the memory."""
        try:
            yield
        except Exception as error:
            full = full_memory(error)
            if full is None or not progress.in_step:
                raise
            count = self.settings.accumulate
            used = memory_mib(self.device)
            details = (
                f" in step {progress.steps_done + 1}: {used} MiB were in use, --batch_size "
                f"{recipe.batch_size}, --accumulate {count}, precision {self.precision}"
            )
            remedies = []
            if self.precision.apex is None:  # with which there are no parts
                remedies += accumulation.more_parts(recipe.batch_size, count, self.least_in_part)
            if self.precision.dtype is torch.float32:
                remedies.append("half precision with --amp=O1")
            remedies.append("a smaller --batch_size")
            last = checkpoint.checkpoints_newest_first(self.output_dir)
            raise full.as_user_error(
                f"give {' or '.join(remedies)}; last checkpoint: {last[0] if last else 'none'}",
                details,
            ) from error

    @contextmanager
    def _recorded(self, recipe, progress: "Progress", inputs: Iterable[str]) -> Iterator[None]:
        """Write `run.json` at the start and at the end, on the main rank.

        `inputs` are the paths of the data. Of a run that repeats another one, by `--config`, log in
        what it differs.
        """
        if not self.ranks.main:
            yield
            return
        content = self._description(recipe, inputs)
        if self.repeated is not None:
            for line in record.differences(self.repeated, content):
                self.log.info(f"unlike in the run of --config, {line}")
        written = record.RunRecord(self.output_dir, content)
        written.begin()
        try:
            yield
        except BaseException as error:
            with suppress(UserError):  # of a full disk: the first error is the one to report
                written.end(_result_of(error), progress.steps_done, progress.best_ap)
            raise
        result = record.STOPPED if progress.interrupted else record.FINISHED
        written.end(result, progress.steps_done, progress.best_ap)

    def _description(self, recipe, inputs: Iterable[str]) -> dict[str, object]:
        """Return what `run.json` says at the start of the run."""
        resumed = None
        if self.resumed is not None:
            resumed = {
                "checkpoint": os.path.abspath(self.resumed["path"]),
                "step": self.resumed["iteration"],
            }
        program = describe_program(
            recipe, self.command, self.device_line, self.precision, self.ranks.world_size
        )
        flags_to_repeat = record.repeatable_flags(self.flags, flags.INPUTS)
        for name in record.WEIGHTS_FLAGS:
            if name in flags_to_repeat:
                flags_to_repeat[name] = self._path_after_renaming(flags_to_repeat[name])
        weights = []
        if self.resumed is None:  # else they are not read
            for name in record.FLAGS_OF_START_WEIGHTS:
                if flags_to_repeat.get(name):
                    weights.append(flags_to_repeat[name])
        return {
            **program,
            FLAGS_ENTRY: flags_to_repeat,
            "resumed": resumed,
            "weights": record.describe_weights(weights),
            "data": record.describe_files(inputs),
            "seed": self.seed,
        }

    def _path_after_renaming(self, path: str) -> str:
        """Return where a file lies now: a former run in the output folder has been renamed."""
        folder = os.path.abspath(self.output_dir)
        former_runs = renamed_folders(self.output_dir)
        if os.path.exists(path) or not former_runs or not Path(path).is_relative_to(folder):
            return path
        return str(former_runs[0] / Path(path).relative_to(folder))

    def parallel(
        self, model: nn.Module, optimizer: Optimizer, cuda_graphs: bool = False
    ) -> tuple[nn.Module, Optimizer]:
        """Return the network and the optimizer as the precision and the number of ranks ask.

        With `--compile` the network is compiled; `cuda_graphs` as in `Compiler.network`, but not
        on several ranks, whose gradients are reduced in the midst of the backward pass, and not
        with `--accumulate`, where a part would overwrite the gradients of the one before.
        """
        network, optimizer = self.precision.prepare(
            model, optimizer, will_be_compiled=self.compiler.compiles_networks
        )
        one_rank = self.ranks.world_size == 1
        if not one_rank:
            network = distributed.parallel(network, self.precision.reduce_dtype)
        one_part = self.settings.accumulate == 1
        network = self.compiler.network(network, cuda_graphs and one_rank and one_part)
        if self.profile is not None:
            self.profile.measure_network(network)
        return network, optimizer

    def accumulation(
        self,
        model: nn.Module,
        network: nn.Module,
        batch_size: int,
        normaliser: Callable,
        least: int = 1,
    ) -> Accumulation:
        """Return what splits a batch into the parts that `--accumulate` asks for.

        `network` is what `parallel` made of `model`; `normaliser` is that of the loss. The model
        needs `least` images in a part, which the caller has checked. Raise UserError where there
        are no such parts.
        """
        self.least_in_part = least
        count = self.settings.accumulate
        accumulation.require_equal_parts(batch_size, count)
        if count > 1:
            self.log.info(accumulation.description(model, batch_size, count))
        is_parallel = self.ranks.world_size > 1
        return Accumulation(count, network, is_parallel, normaliser)

    def compiled(self, function: Function, phase: str) -> Function:
        """Return a function or module as it is, with `--compile` its compiled form.

        With `--profile` its calls are a phase of the step, of this name.
        """
        function = self.compiler.function(function)
        if self.profile is not None:
            return self.profile.measured(phase, function)
        return function


def _result_of(error: BaseException) -> str:
    """Return an error as the result of a run."""
    explained = as_user_error(error) if isinstance(error, Exception) else None
    if explained is None:
        return f"error: {type(error).__name__}: {error}"
    return f"error: {one_line(explained)}"


class WithoutRise(NamedTuple):
    """How long AP has not risen; a checkpoint has it, so that a resumed run goes on counting."""

    evaluations: int = 0
    steps_done: int = -1  # at the last evaluation that was counted


class Difference(NamedTuple):
    """A value of a resumed run that is another one now."""

    name: str
    before: object
    now: object


def _differences(before: dict, now: dict) -> list[Difference]:
    """Return in what two runs differ; an earlier version's may lack a name that came later."""
    differences = []
    for name, value in now.items():
        if name in before and before[name] != value:
            differences.append(Difference(name, before[name], value))
    return differences


def _state_to_resume(args: Namespace, model: str, weights_flag: str, log: RunLog) -> dict | None:
    """Return the state that a run goes on from, None for a new one; log what is noticed."""
    resume = args.resume
    has_own = checkpoint.written_since(args.started, args.output_dir)
    if has_own and distributed.may_be_restarted():
        resume = "auto"
        log.warning("the launcher has started all ranks anew")
    state = checkpoint.load_resume_state(
        resume, args.output_dir, model, weights_flag, warn=log.warning
    )
    if state is not None:
        for flag in ("pretrained", "checkpoint", "resnet_checkpoint"):
            path = vars(args).get(flag)
            if path:
                log.info(f"--{flag} {path} is not read: the resumed run has its own")
        return state
    if resume == "auto":
        log.info(f"--resume auto: no whole checkpoint in {args.output_dir}: a new run begins")
        newest = _newest_of_renamed_runs(args.output_dir)
        if newest is not None:
            log.warning(f"a former run was renamed; --resume={newest} goes on with it")
    return None


def _require_possible_sweep(args: Namespace) -> None:
    """Raise UserError for flags that ask for something else than what `--find_lr` does."""
    if args.look or args.replay or args.profile:
        raise UserError("--find_lr: not with --look, --replay or --profile", "omit one of them")
    if args.resume not in ("none", "auto"):
        raise UserError("--find_lr: begins with the weights of a new run", "omit --resume")


def _replayed_step(args: Namespace, state: dict | None) -> ReplayedStep:
    """Return the step of `--replay`, with what the log in `--output_dir` says of it.

    A log of an earlier version does not say on how many ranks the step was done; then `state`, the
    checkpoint before it, does. Raise UserError where there is neither.
    """
    header = header_of_step(args.output_dir, args.replay)
    if header is None and state is None:
        raise UserError(
            f"--replay {args.replay}: {args.output_dir} has neither a log nor a checkpoint before "
            "that step",
            "name the folder of the run with --output_dir",
        )
    header = header or {}
    world_size = header.get("ranks")
    if world_size is None and state is not None:
        world_size = len(state["windows"])
    if world_size is None:
        raise UserError(
            f"--replay {args.replay}: the log in {args.output_dir} does not say on how many ranks "
            "the run was, and there is no checkpoint before that step",
            "replay a later step",
        )
    index_of_batch = args.replay - 1
    if vars(args).get("fake_input"):  # the first batch of the process was repeated
        index_of_batch = header.get("first_step", 1) - 1
    return ReplayedStep(
        number=args.replay,
        index_of_batch=index_of_batch,
        world_size=world_size,
        seed=header.get("seed"),
        config=header.get("config"),
    )


def _newest_of_renamed_runs(folder: Path) -> Path | None:
    """Return the newest checkpoint of the last former run of a folder that has one."""
    for former in renamed_folders(folder):
        checkpoints = checkpoint.checkpoints_newest_first(former)
        if checkpoints:
            return checkpoints[0]
    return None


class RunState:
    """Writes the state of a run, and puts a written one back: the only place that knows its form.

    A run that is resumed must have the same global batch, number of images, seed, recipe but for
    the fields in MAY_CHANGE, and `identity`, by the words that a message calls it. `train_set` and
    `val_set` give the classes and their category ids.
    """

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        ema: WeightAverage,
        optimizer: Optimizer,
        progress: "Progress",
        recipe,
        train_set,
        val_set,
        identity: dict[str, object] | None = None,
        remedy: str = "start anew from its weights with --checkpoint_path",
    ):
        self.run = run
        self.model = model
        self.ema = ema
        self.optimizer = optimizer
        self.progress = progress
        self.remedy = remedy
        # An evaluation whose metrics are computed in the background: its steps, on the main rank
        # also the call.
        self._evaluated_steps: int | None = None
        self._metrics: BackgroundCall | None = None
        self.identity = {
            **(identity or {}),
            "global batch": recipe.batch_size * run.ranks.world_size,
            "training images": len(train_set),
            "checksum of the training set": train_set.checksum(),
            "seed": run.seed,
            "frozen stages of the backbone": run.frozen_stages,
        }
        self.description = {
            "written_by": recipe.model,
            "onestage_version": __version__,
            "recipe": dataclasses.asdict(recipe),
            "classes": list(train_set.class_names),
            "category_ids": list(val_set.category_ids),
            "run": self.identity,
            # Of a resumed run they may be other ones, which is logged: batch norm sees others.
            "flags": {"accumulate": run.settings.accumulate, "sync_bn": run.settings.sync_bn},
        }

    def restore(self) -> None:
        """Go on from `run.resumed`, in mid-epoch and with the same order and augmentation.

        What a recipe may change takes effect in the optimizer as well, and is logged. On another
        number of ranks the running statistics are the averaged ones. Raise UserError where the
        resumed run was another one.
        """
        state = self.run.resumed
        if state is None:
            return
        self._require_same_run(state)
        load_same(self.model, state["model"], state["path"])
        rank = self.run.ranks.rank
        if len(state["windows"]) == self.run.ranks.world_size:
            self.model.load_state_dict(state["buffers"][rank], strict=False)
            self.progress.window.load_state_dict(state["windows"][rank])
        self._restore_average(state)
        self._restore_optimizer(state["optimizer"])
        if state["scaler"]:
            self.run.precision.scaler.load_state_dict(state["scaler"])
        self.progress.steps_done = state["iteration"]
        self.progress.best_ap = state["best"]
        self.progress.without_rise = WithoutRise(*state.get("without_rise", WithoutRise()))
        self.run.log.info(f"resumed from {state['path']} at iteration {state['iteration']}")
        for field, before, now in _differences(state["recipe"], self.description["recipe"]):
            self.run.log.info(f"from here on {field} is {now}; it was {before}")
        flags_before = state.get("flags", {})  # which earlier versions did not write
        for flag, before, now in _differences(flags_before, self.description["flags"]):
            self.run.log.info(f"from here on --{flag} is {now}; it was {before}")

    def _require_same_run(self, state: dict) -> None:
        differences = _differences(state["run"], self.identity)
        for difference in _differences(state["recipe"], self.description["recipe"]):
            if difference.name not in MAY_CHANGE:
                differences.append(difference)
        if differences:
            texts = [f"{name} ({before} before, {now} now)" for name, before, now in differences]
            raise UserError(
                f"--resume {state['path']}: this run differs in {', '.join(texts)}",
                f"go on as it was, or {self.remedy}",
            )

    def _restore_average(self, state: dict) -> None:
        """Restore the averages; log what is done where only one of the two runs has them."""
        path = state["path"]
        averages = averages_of(state)
        if not self.ema.decay:
            if averages:
                self.run.log.info(f"{path}: without --ema its averaged weights are dropped")
            return
        if not averages:
            self.ema.begin_again()
            self.run.log.info(f"{path}: has no averaged weights: --ema begins with its weights")
            return
        load_same(self.ema.model, averages["model"], path)
        if len(averages["buffers"]) == self.run.ranks.world_size:
            buffers = averages["buffers"][self.run.ranks.rank]
            self.ema.model.load_state_dict(buffers, strict=False)
        self.ema.updates = averages["updates"]
        if averages["decay"] != self.ema.decay:
            self.run.log.info(
                f"from here on --ema is {self.ema.decay:g}; it was {averages['decay']:g}"
            )

    def _restore_optimizer(self, state: dict) -> None:
        """Restore what the optimizer has gathered; its options are those of this run's recipe."""
        options = []
        for group in self.optimizer.param_groups:
            options.append({name: value for name, value in group.items() if name != "params"})
        self.optimizer.load_state_dict(state)
        for group, options_of_group in zip(self.optimizer.param_groups, options, strict=True):
            group.update(options_of_group)

    def save(self, name: str | None = None) -> None:
        """Write the state to `iter_<n>.pt`, or under another name; all ranks must call it.

        A state that is not finite is never written: that raises UserError. With `--no-save` only
        this is checked. An evaluation of earlier steps ends first: a run that is resumed from this
        state would not repeat it. Where it fails in a run that is being stopped, the state is
        written before the error is raised.
        """
        failure = None
        try:
            self.finish_evaluation()
        except UserError as error:
            if not self.progress.interrupted:
                raise
            failure = error
        self._write(name)
        if failure is not None:
            raise failure

    def _write(self, name: str | None) -> None:
        run = self.run
        if self.progress.goal_reached and name is None:
            return  # the state that reached it, of earlier steps, is the last one
        with self.progress.paused():
            self.progress.require_finite()
            if not run.settings.save:
                return
            buffers = distributed.gather_buffers(self.model, run.ranks)
            averaged_buffers = None
            if self.ema.decay:
                averaged_buffers = distributed.gather_buffers(self.ema.model, run.ranks)
            windows = run.ranks.all_gather_objects(self.progress.window.state_dict())
            if run.ranks.main:
                path = run.output_dir / (name or f"iter_{self.progress.steps_done}.pt")
                content = self._content(buffers, windows)
                if averaged_buffers is not None:
                    content["ema"] = self._averages(averaged_buffers)
                checkpoint.save(path, content)
                checkpoint.delete_old(
                    run.output_dir, last_step=self.progress.steps_done, keep=run.settings.keep
                )
                run.log.info(f"Saving checkpoint {path}")
            run.ranks.barrier()
            if name is None:
                self.progress.note_checkpoint()

    def save_best(self) -> None:
        """Write the state to `best.pt`."""
        self.save(checkpoint.BEST)

    def add_evaluation(
        self, evaluate_and_save: Callable, result_rows: np.ndarray | None, *arguments: object
    ) -> None:
        """Evaluate the result rows, which the main rank has, and keep the state if it is the best.

        `evaluate_and_save` is a recipe's; `arguments` are those between the rows and the folder.
        With `--background_metrics` a process computes while training goes on, unless the run ends
        here; `finish_evaluation` does the rest. All ranks must call it.
        """
        run = self.run
        steps_done = self.progress.begin_evaluation()
        evaluation_of_rows = partial(
            evaluate_and_save,
            result_rows,
            *arguments,
            run.output_dir,
            run.evaluation_options,
            step=steps_done,
        )
        if run.settings.background_metrics and steps_done != self.progress.end:
            self.save(checkpoint.EVALUATED)
            self._evaluated_steps = steps_done
            if run.ranks.main:
                name = f"the metrics of step {steps_done}"
                self._metrics = BackgroundCall(name, evaluation_of_rows)
                run.log.info(f"{name} are computed in the background")
            return
        evaluation = None
        if run.ranks.main:
            evaluation = evaluation_of_rows(log=run.log.info)
        if self.progress.add_evaluation(evaluation, steps_done):
            self.save_best()

    def look_for_metrics(self) -> None:
        """At a log line, finish an evaluation whose metrics are there; all ranks must call it."""
        if self._evaluated_steps is None or not self.progress.log_due(self.progress.steps_done):
            return
        are_there = self._metrics is not None and self._metrics.finished()
        if self.run.ranks.any(are_there):
            self.finish_evaluation()

    def finish_evaluation(self) -> None:
        """Wait for an evaluation in the background, if any, log it, and keep its state if best.

        Raise UserError, on all ranks, where it has failed.
        """
        if self._evaluated_steps is None:
            return
        run = self.run
        steps_done = self._evaluated_steps
        self._evaluated_steps = None
        with self.progress.paused():
            evaluation = None
            obstacle = None
            if run.ranks.main:
                try:
                    outcome = self._metrics.outcome()
                except UserError as error:
                    obstacle = one_line(error)
                else:
                    evaluation = outcome.value
                    for line in outcome.lines:
                        run.log.info(line)
                self._metrics = None
            obstacle = run.ranks.from_main(obstacle)
            if obstacle is not None:
                raise UserError(obstacle)
            is_best = self.progress.add_evaluation(evaluation, steps_done)
            if run.ranks.main:
                checkpoint.keep_evaluated(run.output_dir, is_best)

    def _content(self, buffers: list[dict], windows: list[dict]) -> dict:
        return {
            # Running statistics averaged over ranks, for whoever evaluates
            "model": self._finite_weights(self.model, buffers),
            "buffers": buffers,  # and each rank's own, for an exact resume
            "windows": windows,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.run.precision.scaler.state_dict(),
            "iteration": self.progress.steps_done,
            "best": self.progress.best_ap,
            "without_rise": tuple(self.progress.without_rise),
            **self.description,
        }

    def _averages(self, buffers: list[dict]) -> dict:
        return {
            "model": self._finite_weights(self.ema.model, buffers),
            "buffers": buffers,
            "updates": self.ema.updates,
            "decay": self.ema.decay,
        }

    def _finite_weights(self, model: nn.Module, buffers: list[dict]) -> dict[str, Tensor]:
        """Return the weights on the CPU, with the mean over ranks of their `buffers`.

        Raise UserError for values that are not finite.
        """
        weights = weights_on_cpu(model, distributed.mean_buffers(buffers))
        for value in weights.values():
            if not torch.isfinite(value).all():
                raise UserError(f"weights are not finite; {self.progress.remedy}")
        return weights
