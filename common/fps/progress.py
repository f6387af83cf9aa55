"""The course of a run: its steps, what is due after each of them, its log lines and its end."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.coco.analysis_report import ReadImage, write_analysis
from common.coco.evaluation import Evaluation
from common.coco.page import write_report
from common.errors import UserError, one_line
from common.fps.curves import draw_curves
from common.fps.meter import Meter
from common.fps.network_size import num_parameters
from common.fps.profile import time_loader
from common.fps.summary import write_summary
from common.fps.window import LossWindow, NotFinite
from common.npu.checkpoint import checkpoints_newest_first
from common.npu.device import in_host_memory, memory_mib, overflow_happened
from common.npu.entry import as_user_error, leave_dead_workers_to_the_loader
from common.npu.run import SECONDS_BETWEEN_CHECKPOINTS, Run, WithoutRise
from common.schedule import evaluation_interval

NOT_EVALUATED = -1.0  # an AP that there is not


class Progress:
    """Counts the steps of a run, logs them, and knows what is due.

    `recipe` gives `lr_at`, `batch_size`, `epochs`, `evaluation` (epochs), `eval_interval`,
    `threshold` and `name`; `terms` are the names of what is logged, the total `loss` after its
    summands. A run has `steps_per_epoch` and ends after `total_steps`, or after `--max_iters`. Log
    lines follow every `--log_interval` steps; the count begins anew every `log_period` steps, by
    default an epoch. Where the flag is not given, lines that would follow another one too soon are
    left out, but never the last one. `remedy` ends the message on a loss that is not finite.
    """

    def __init__(
        self,
        run: Run,
        recipe,
        terms: tuple[str, ...],
        steps_per_epoch: int,
        total_steps: int,
        remedy: str,
        log_period: int | None = None,
    ):
        self.run = run
        self.recipe = recipe
        self.terms = terms
        self.steps_per_epoch = steps_per_epoch
        self.end = total_steps
        if run.settings.max_iters:
            self.end = min(total_steps, run.settings.max_iters)
        if run.profile is not None and self.end < run.profile.num_steps:
            raise UserError(
                f"--profile {run.profile.steps}: needs {run.profile.num_steps} steps, this run has "
                f"{self.end}",
                "raise --epochs",
            )
        self.remedy = remedy
        self.log_period = steps_per_epoch if log_period is None else log_period
        # At least two lines an epoch and two a run, however short they are.
        self.log_interval = max(
            1, min(run.settings.log_interval, self.log_period // 2, self.end // 2)
        )
        self._last_line = self._steps_of_last_line()
        # No line between these numbers of steps, unless it is the last one.
        self._quiet_after = 0
        self._quiet_until = 0
        self._checkpoint_at: float | None = None  # on the clock, of the last one of this process
        self.images_per_step = recipe.batch_size * run.ranks.world_size
        self.steps_done = 0
        self.best_ap = NOT_EVALUATED
        self.last_ap = NOT_EVALUATED
        self.without_rise = WithoutRise()
        self.goal_reached = False
        self.interrupted = False
        self.in_step = False  # between a batch and the `add` of its losses
        self.window = LossWindow(terms, run.device)
        self.meter = Meter(self.images_per_step)
        self._evaluated_at = -1
        self._last_table = ""  # of COCO's figures
        self._began_at = 0  # steps done when this process began
        self.logged_at = 0  # steps done at the last log line
        self._to_report: tuple[int, LossWindow] | None = None  # on its way from the device
        self._logged_losses: list[float] = []
        self._waited = 0.0  # seconds for the batch of this step
        self._data_error: UserError | None = None

    def begin(self, num_images: int, num_classes: int, rate: str) -> None:
        """Log the plan of the run and start the clock; `rate` describes the learning rate."""
        world_size = self.run.ranks.world_size
        self.meter = Meter(self.images_per_step)
        self.run.log.info(
            f"{num_images} images, {num_classes} classes; global batch {self.images_per_step} "
            f"({world_size} x {self.recipe.batch_size}): {rate}; "
            f"{self.steps_per_epoch} iterations an epoch, steps {self.steps_done} to {self.end}; "
            f"{self.meter.formula}"
        )
        self._began_at = self.steps_done
        if self.images_per_step > num_images:
            self.run.log.warning(
                f"the global batch of {self.images_per_step} images is larger than the data set of "
                f"{num_images}: a step sees images more than once; lower --batch_size"
            )
        if self.steps_done > self.end:
            self.run.log.warning(
                f"the resumed run has done {self.steps_done} steps, more than the {self.end} of "
                "this one: nothing is trained; raise --epochs or --max_iters"
            )
        self.run.log.begin(self.end, self.steps_done, self.steps_per_epoch)

    def steps(self, loader: Iterable) -> Iterator[tuple[int, object]]:
        """Yield the number of each step, from 0, and its batch; `add` must follow each.

        It ends early where the goal is reached, AP has not risen for as long as `--patience` says,
        a signal asks for it, a rank meets bad data or one of its loader workers has died: all ranks
        leave at the same step. But for the goal and the patience, `interrupted` is set.
        """
        batches = iter(loader)
        leave_dead_workers_to_the_loader()
        while self.steps_done < self.end and not (self.goal_reached or self.patience_is_over):
            asked_at = time.perf_counter()
            batch = None
            try:
                batch = next(batches)
            except Exception as error:
                self._data_error = as_user_error(error)
                if self._data_error is None:
                    raise
            self._waited = time.perf_counter() - asked_at
            if self.run.stop.agreed(self.run.ranks, also=self._data_error is not None):
                self.interrupted = True
                return
            self.in_step = True
            yield self.steps_done, batch
        if self.run.profile is not None:
            del batches  # and its workers
            self._report_profile(loader)

    def _report_profile(self, loader: Iterable) -> None:
        """Log what `--profile` has measured, and how fast the loader is alone."""
        if self.run.ranks.main:
            self.run.log.info(self.run.profile.report(self.images_per_step))
        if isinstance(loader, DataLoader):  # not with --fake_input
            self.run.log.info(time_loader(loader, self.recipe.batch_size))

    @property
    def patience_is_over(self) -> bool:
        """Whether AP has not risen in as many evaluations as `--patience` says."""
        patience = self.run.settings.patience
        return 0 < patience <= self.without_rise.evaluations

    def exit_status(self) -> int:
        """Return the exit status of an interrupted run; raise bad data as its UserError.

        Every rank raises what one of them has met: whichever ends first tells it.
        """
        message = None
        if self._data_error is not None:
            message = one_line(self._data_error)
        for message_of_rank in self.run.ranks.all_gather_objects(message):
            if message_of_rank is not None:
                raise UserError(message_of_rank)
        return self.run.stop.status

    def lr(self, step: int) -> float:
        """Return the recipe's learning rate of a step, from 0."""
        world_size = self.run.ranks.world_size
        return self.recipe.lr_at(step, self.steps_per_epoch, world_size, self.recipe.batch_size)

    def add(self, step: int, losses: dict[str, Tensor], image_ids: Tensor) -> None:
        """Count a step with its losses (0-dim, on the device) and image ids (on the host)."""
        self.window.add(step, losses, image_ids)
        self.in_step = False
        self.steps_done = step + 1
        self.report()  # of an earlier step: an accelerator has this one to do meanwhile
        self._leave_out_compilation()
        self.meter.step(self._waited)
        self.run.log.bar.update()
        if self.run.profile is not None:
            folder = self.run.output_dir if self.run.ranks.main else None
            self.run.profile.step_done(self._waited, folder)
        if self.log_due(self.steps_done):
            self._end_window()
            if in_host_memory(self.run.device):
                self.report()

    def _end_window(self) -> None:
        self._to_report = (self.steps_done, self.window.fetch())
        self.window = LossWindow(self.terms, self.run.device)

    def _leave_out_compilation(self) -> None:
        """Stop the clock, afterwards, for what `--compile` took in this step, and log it."""
        seconds = self.run.compiler.take_seconds()
        if seconds:
            self.meter.leave_out(seconds)
            self.run.log.info(f"--compile took {seconds:.0f} s in step {self.steps_done}")

    def log_due(self, steps_done: int) -> bool:
        """Return whether a log line follows this many steps."""
        if self._quiet_after < steps_done < self._quiet_until and steps_done != self._last_line:
            return False
        return self._at_log_interval(steps_done)

    def _at_log_interval(self, steps_done: int) -> bool:
        within_period = (steps_done - 1) % self.log_period + 1
        return within_period % self.log_interval == 0

    def _steps_of_last_line(self) -> int:
        steps_done = self.end
        while steps_done > 0 and not self._at_log_interval(steps_done):
            steps_done -= 1
        return steps_done

    def _be_quiet(self, line: int, seconds_a_step: float) -> None:
        """Leave out lines too soon after the one of `line` steps; the same on all ranks.

        The caller may know already whether a line follows the present step: that stays.
        """
        settings = self.run.settings
        if settings.log_seconds == 0:
            return
        steps = math.ceil(settings.log_seconds / seconds_a_step)
        self._quiet_after = self.steps_done
        # In epochs of few steps the interval between lines is less than what the settings say.
        self._quiet_until = line + max(steps, settings.log_interval)

    def first_epoch_done(self) -> bool:
        """Return whether this process has now done an epoch's number of steps, or all its steps.

        It is true once: this is when to say what was noticed in the images.
        """
        return self.steps_done == min(self._began_at + self.steps_per_epoch, self.end)

    def checkpoint_due(self) -> bool:
        """Return whether the state is to be saved now.

        That is after every interval, at the end, and before an evaluation: a run that ends in its
        evaluation begins there again. The default interval is an epoch, or the first epoch that
        ends some minutes after the last checkpoint. All ranks must call it.
        """
        if self.steps_done == self.end or self.patience_is_over or self.evaluation_due():
            return True
        interval = self.run.settings.save_interval
        if interval:
            return self.steps_done % interval == 0
        if self.steps_done % self.steps_per_epoch:
            return False
        return self.run.ranks.from_main(self._checkpoint_is_old())

    def _checkpoint_is_old(self) -> bool:
        """Return whether this process has written no checkpoint for some minutes, or none yet."""
        if self._checkpoint_at is None:
            return True
        return time.perf_counter() - self._checkpoint_at >= SECONDS_BETWEEN_CHECKPOINTS

    def note_checkpoint(self) -> None:
        """Note that a checkpoint was written now."""
        self._checkpoint_at = time.perf_counter()

    def evaluation_due(self) -> bool:
        """Return whether an evaluation is wanted after this step and not done."""
        if not self.run.settings.evaluate or self._evaluated_at == self.steps_done:
            return False
        if self.goal_reached or self.patience_is_over:  # by an evaluation of an earlier step
            return False
        if self.steps_done == self.end:
            return True
        epochs_done, steps_of_next = divmod(self.steps_done, self.steps_per_epoch)
        if steps_of_next or epochs_done == 0:
            return False
        interval = evaluation_interval(
            self.recipe.eval_interval, self.recipe.evaluation, self.recipe.epochs
        )
        at_interval = interval > 0 and epochs_done % interval == 0
        return at_interval or epochs_done in self.recipe.evaluation

    def paused(self) -> AbstractContextManager[None]:
        """Stop the clock for evaluation or checkpoint writing; log first what is on its way."""
        self.report()
        return self.meter.paused()

    def report(self) -> None:
        """Write the log line that waits, if any: losses are means over the window and all ranks."""
        if self._to_report is None:
            return
        steps_done, window = self._to_report
        self._to_report = None
        self._require_finite(window.first_not_finite())
        timing = self.meter.window()
        of_ranks = self.run.ranks.all_gather_objects((window.means(), timing.time))
        losses = {}
        for term in self.terms:
            losses[term] = sum(means[term] for means, _ in of_ranks) / len(of_ranks)
        _, seconds_a_step = of_ranks[0]
        self._be_quiet(steps_done, seconds_a_step)
        self.logged_at = steps_done
        self._logged_losses.append(losses["loss"])
        lr = self.lr(steps_done - 1)
        memory = memory_mib(self.run.device)
        self.run.log.train(steps_done, lr, losses, timing, memory)
        if self.run.ranks.any(overflow_happened(self.run.device)):
            scale = self.run.precision.loss_scale
            self.run.log.warning(
                f"a number was too large since the last line; lower --loss_scale={scale} if it "
                "happens often"
            )

    def require_finite(self) -> None:
        """Raise UserError, on all ranks, where a loss since the last log line is not finite."""
        self.report()
        self._require_finite(self.window.fetch().first_not_finite())

    def _require_finite(self, not_finite: NotFinite | None) -> None:
        first = None
        for rank, of_rank in enumerate(self.run.ranks.all_gather_objects(not_finite)):
            if of_rank is not None and (first is None or of_rank.step < first[1].step):
                first = (rank, of_rank)
        if first is None:
            return
        rank, (step, term, image_ids) = first
        checkpoints = checkpoints_newest_first(self.run.output_dir)
        epoch = step // self.steps_per_epoch + 1
        number = step + 1  # as the log counts steps, and --replay does
        # Only the main rank is sure to stand where the paths of the flags lead to the run.
        command = self.run.ranks.from_main(self.run.replay_command(number))
        raise UserError(
            f"{term} is not finite, first at iteration {number} (epoch {epoch}) on rank {rank}, "
            f"learning rate {self.lr(step):g}, images {image_ids}; "
            f"last good checkpoint: {checkpoints[0] if checkpoints else 'none'}; {self.remedy}; "
            f"to draw the images of this step: {command}"
        )

    def begin_evaluation(self) -> int:
        """Note that the evaluation of this step is no longer due; return the number of steps."""
        self._evaluated_at = self.steps_done
        return self.steps_done

    def add_evaluation(self, evaluation: Evaluation | None, steps_done: int) -> bool:
        """Log an evaluation, which only the main rank has; return whether it is the best so far.

        `steps_done` is what `begin_evaluation` returned.
        """
        ap = None
        if evaluation is not None:
            ap = evaluation.stats["AP"]
            self._last_table = evaluation.text
            self.run.log.val(steps_done, self.lr(steps_done - 1), evaluation.mmdet())
            self.run.log.add_events(steps_done, event_figures(evaluation), evaluation.pictures())
        self.last_ap = self.run.ranks.from_main(ap)
        self.goal_reached = 0 < self.recipe.threshold <= self.last_ap
        if self.goal_reached:
            self.run.log.info(f"AP goal {self.recipe.threshold:g} reached: training ends here")
        is_best = self.last_ap > self.best_ap
        self.best_ap = max(self.best_ap, self.last_ap)
        self._count_without_rise(is_best, steps_done)
        return is_best

    def _count_without_rise(self, is_best: bool, steps_done: int) -> None:
        """Count an evaluation without a higher AP, once where a resumed run repeats it."""
        if is_best:
            self.without_rise = WithoutRise(0, steps_done)
        elif steps_done != self.without_rise.steps_done:
            self.without_rise = WithoutRise(self.without_rise.evaluations + 1, steps_done)
        if self.patience_is_over and not self.goal_reached:
            self.run.log.info(
                f"AP has not risen above {self.best_ap:.5f} in {self.without_rise.evaluations} "
                "evaluations (--patience): training ends here"
            )

    def finish(self) -> None:
        """Write the summary and draw the curves; of a run that ends early, log the last steps."""
        self.report()
        ends_early = self.goal_reached or self.patience_is_over
        if ends_early and self.window.steps and self.steps_done > self._began_at:
            self._end_window()
            self.report()
        log = self.run.log
        folder = self.run.output_dir
        kind = "acc" if self.run.settings.evaluate else "perf"
        if self._last_table:
            log.info(f"the last evaluation:\n{self._last_table}")
        log.info(self.meter.formula)
        if not self._logged_losses and any(folder.glob(f"*p_{kind}.log")):
            log.info("nothing was left to log: curves and summary stay as they were")
            return
        if not self.run.ranks.main:
            return
        fps = None
        if self.run.profile is not None:  # which has slowed some of the steps
            fps = self.run.profile.images_per_second(self.images_per_step)
        elif self._logged_losses:
            fps = self.meter.fps_average
        closing_lines = write_summary(
            folder,
            network=self.recipe.name,
            batch_size=self.recipe.batch_size,
            num_ranks=self.run.ranks.world_size,
            kind=kind,
            seconds=time.time() - self.run.settings.started,
            fps=fps,
            accuracy=None if self.last_ap == NOT_EVALUATED else self.last_ap,
            losses=self._logged_losses,
        )
        log.info("\n".join(closing_lines))
        draw_curves(sorted(folder.glob("*.log.json")), folder / "curves.png")

    def explain(
        self,
        model: nn.Module,
        annotation_file: str,
        class_names: Sequence[str],
        read_image: ReadImage,
        evaluation_folder: Path | None = None,
    ) -> None:
        """Explain the last evaluation of the run, if any, and write `report.html` on the main rank.

        The annotations, classes and images are those of the val set, as `write_analysis` takes
        them. `evaluation_folder` has the files of the evaluation, where that is not the run's.
        """
        run = self.run
        if not run.ranks.main:
            return
        was_evaluated = self.last_ap != NOT_EVALUATED
        if was_evaluated and run.evaluation_options.analysis:
            folder = evaluation_folder or run.output_dir
            write_analysis(folder, annotation_file, class_names, read_image, run.log.info)
        write_report(
            run.output_dir,
            num_parameters(model),
            run.log.info,
            evaluation_folder=evaluation_folder,
        )


def event_figures(evaluation: Evaluation) -> dict[str, float]:
    """Return the figures of an evaluation by their tags in TensorBoard."""
    figures = {f"coco/{name}": value for name, value in evaluation.stats.items()}
    for metrics in evaluation.classes:
        figures[f"AP of class/{metrics.name}"] = metrics.ap
    return figures
