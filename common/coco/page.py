"""The page of a run: `report.html`, one file that needs no network, made of what its folder holds.

The templates beside this module (`templates/`) say what a page looks like. A part for which the
folder has no file is left out.
"""

import base64
import io
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
from PIL import Image

from common.coco.analysis import ERROR_TYPES
from common.coco.analysis_report import ANALYSIS_FILE
from common.coco.counts import FEW_BOXES
from common.coco.data_picture import data_picture_file
from common.coco.error_pictures import BACKGROUND_NAME, confusion_shares
from common.coco.evaluation import ABSENT
from common.coco.metrics import METRICS_FILE, PR_CURVES_JSON
from common.errors import UserError
from common.files import encoded, write_atomically
from common.fps.curves import panel_svg, read_panels
from common.fps.summary import read_summary
from common.npu.record import read_record

REPORT_FILE = "report.html"
TEMPLATES = Path(__file__).with_name("templates")
MAIN_METRICS = ("AP", "AP50")
SUMMARY_METRICS = ("AP", "AP50", "AP75", "APsmall", "APmedium", "APlarge", "AR100")
PICTURES = ("detections", "worst_images", "suspect_labels")
JPEG_QUALITY = 80  # of photographs
# A confusion matrix of more classes has no numbers in its cells, one of still more is not shown.
READABLE_CLASSES = 20
MOST_CLASSES = 120
# In the list of confusions, in the place of a class.
NO_BOX = "(no box)"
NO_DETECTION = "(missed)"
CONFUSIONS_LISTED = 100
WARNINGS_LISTED = 20
NO_FIGURE = "-"
WARNING_MARK = " - WARNING - "  # in a line of a run's log
SECTIONS = (
    ("summary", "Summary"),
    ("curves", "Curves"),
    ("classes", "Classes"),
    ("pr_curves", "Precision-recall"),
    ("confusion", "Confusion"),
    ("errors", "Errors"),
    ("detections", "Detections"),
    ("worst_images", "Worst images"),
    ("suspects", "Suspects"),
    ("data", "Data"),
    ("speed", "Speed"),
    ("programs", "Command"),
)
ALWAYS_SHOWN = ("summary", "data", "speed", "programs")


def write_report(
    folder: Path,
    num_parameters: int,
    log: Callable[[str], None],
    evaluation: Mapping[str, object] | None = None,
    evaluation_folder: Path | None = None,
) -> None:
    """Write `report.html` in the folder of a run or of an evaluation, and log its path.

    `evaluation` describes the program that evaluated, see `describe_program`, where that was no
    training. `evaluation_folder` has the files of the evaluation, where that is not `folder`. Raise
    UserError where the page cannot be written.
    """
    evaluation_folder = evaluation_folder or folder
    logs = sorted(folder.glob("*.log.json"))
    title = "Evaluation"
    programs = []
    for record in trainings(folder):
        started = record["started"].replace("T", " ")
        programs.append({"heading": f"Training, {started}", **program_lines(record)})
        title = record["recipe"]["name"]
    if evaluation is not None:
        programs.append({"heading": "Evaluation", **program_lines(evaluation)})
        title = evaluation["recipe"]["name"]
    metrics = read_json(evaluation_folder / METRICS_FILE)
    analysis = read_json(evaluation_folder / ANALYSIS_FILE)
    if not is_of_same_evaluation(analysis, metrics):
        analysis = {}
    classes = metrics.get("classes", [])
    curves = pr_choices(read_json(evaluation_folder / PR_CURVES_JSON), classes)
    pictures = {}
    for name in PICTURES:
        pictures[name] = read_picture(evaluation_folder / f"{name}.png")
    content = {
        "title": title,
        "subtitle": str(folder.resolve()),
        "folder": str(folder),
        "figures": figures_of_run(metrics, read_summary(folder), num_parameters),
        "metrics": metrics,
        "warnings": warnings_of(folder),
        "curves": [inline_svg(panel_svg(panel)) for panel in read_panels(logs) if panel.entries],
        "classes": classes,
        "pr_curves": curves,
        "curve_of_class": positions(curves),
        "confusion": confusion_table(analysis.get("confusion")),
        "errors": error_rows(analysis.get("errors", {})),
        "detections": pictures["detections"],
        "pictures": pictures,
        "worst_images": analysis.get("worst_images"),
        "suspects": analysis.get("suspects"),
        "data": {
            "picture": read_picture(data_picture_file(folder)),
            "num_images": metrics.get("images"),
            "num_boxes": sum(entry["boxes"] for entry in classes),
            "rare": [entry for entry in classes if entry["boxes"] < FEW_BOXES],
            "few": FEW_BOXES,
        },
        "benchmark": metrics.get("benchmark"),
        "programs": programs,
    }
    shown = [(name, text) for name, text in SECTIONS if content.get(name) or name in ALWAYS_SHOWN]
    path = folder / REPORT_FILE
    write_atomically(path, encoded(render("report.html", sections=shown, **content)))
    log(f"report: {path}")


def render(template: str, **content: object) -> str:
    """Return a page. Every text of its content is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["digits"] = digits
    written = datetime.now().strftime("%Y-%m-%d %H:%M")
    return environment.get_template(template).render(written=written, **content)


def digits(value: float, count: int) -> str:
    """Return a number with so many decimals, thousands parted by a thin space."""
    return f"{value:,.{count}f}".replace(",", "\u2009")


def inline_svg(element: str):
    """Return an SVG element of matplotlib, which has escaped its texts, as a part of a page."""
    from markupsafe import Markup

    return Markup(element)


def read_json(path: Path) -> dict:
    """Return the content of a JSON file of ours, nothing where there is no such file.

    Raise UserError where the file is not whole.
    """
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON ({error}): no {REPORT_FILE} is written",
            "delete it, or evaluate into this folder again, which writes it anew",
        ) from None


def is_of_same_evaluation(analysis: Mapping[str, object], metrics: Mapping[str, object]) -> bool:
    """Return whether an analysis is that of the metrics; `--no-analysis` leaves a former one.

    It begins with their score of the best F1, unless no detection is right.
    """
    score = metrics.get("best_f1", {}).get("score", ABSENT)
    return score == ABSENT or analysis.get("min_score") == score


def trainings(folder: Path) -> list[dict]:
    """Return what the records of a run say: one of each of its processes, in their order.

    Files that are no record are left out.
    """
    records = []
    for path in folder.glob("run*.json"):
        record = read_record(path)
        if record is not None:
            records.append(record)
    records.sort(key=lambda record: record["started"])
    return records


def program_lines(record: Mapping[str, object]) -> dict:
    """Return what a page shows of a program, of which a `run.json` or its like is the record."""
    versions = [f"{name} {version}" for name, version in record["versions"].items() if version]
    values = {
        "model": record["model"],
        "network": record["recipe"]["name"],
        "checkpoint": record.get("checkpoint"),
        "data": ", ".join(file["path"] for file in record.get("data", [])),
        "device": record["device"].removeprefix("device: "),
        "processes": record["ranks"],
        "precision": record["precision"],
        "seed": record.get("seed"),
        "versions": ", ".join(versions),
    }
    if record.get("resumed"):
        values["resumed from"] = record["resumed"]["checkpoint"]
    recipe = "\n".join(f"{name} = {value!r}" for name, value in record["recipe"].items())
    return {
        "command": f"cd {shlex.quote(record['folder'])} && {shlex.join(record['command'])}",
        "facts": [(name, value) for name, value in values.items() if value not in (None, "")],
        "recipe": recipe,
    }


def figures_of_run(
    metrics: Mapping[str, object], summary: Mapping[str, str], num_parameters: int
) -> dict[str, list[dict]]:
    """Return the figures of the summary in two groups: how good the detector is, and the run."""
    accuracy = []
    for name in SUMMARY_METRICS:
        if name in metrics:
            accuracy.append(figure(name, metric_text(metrics[name]), is_main=name in MAIN_METRICS))
    of_run = []
    best = metrics.get("best_f1")
    if best and best["score"] >= 0:
        of_run.append(figure(f"score of the best F1, {best['f1']:.3f}", f"{best['score']:.3f}"))
    if "images" in metrics:
        of_run.append(figure("images of the val set", digits(metrics["images"], 0)))
    if "speed" in metrics:
        of_run.append(figure("images/s in evaluation", digits(metrics["speed"], 1)))
    if "step" in metrics:
        of_run.append(figure("iterations before the evaluation", digits(metrics["step"], 0)))
    if "ActualFPS" in summary:
        of_run.append(figure("images/s in training", digits(float(summary["ActualFPS"]), 1)))
    if "E2ETrainingTime" in summary:
        of_run.append(figure("from start to end", duration(float(summary["E2ETrainingTime"]))))
    of_run.append(figure("parameters", f"{num_parameters / 1e6:.1f} M"))
    return {"accuracy": accuracy, "run": of_run}


def figure(label: str, text: str, is_main: bool = False) -> dict:
    """Return a figure of the summary."""
    return {"label": label, "text": text, "is_main": is_main}


def metric_text(value: float) -> str:
    """Return a metric of COCO, which is -1 where there is no ground truth for it."""
    return f"{value:.4f}" if value >= 0 else NO_FIGURE


def duration(seconds: float) -> str:
    """Return a time in hours and minutes, a short one in minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s"


def warnings_of(folder: Path) -> list[str]:
    """Return the different warnings of a run's text logs, in their order."""
    warnings = {}
    for path in sorted(folder.glob("train_*.log")):
        for line in path.read_text(errors="replace").splitlines():
            _, mark, text = line.partition(WARNING_MARK)
            if mark:
                warnings[text] = None
    return list(warnings)[:WARNINGS_LISTED]


def pr_choices(curves: Mapping[str, dict], classes: Sequence[dict]) -> list[dict]:
    """Return the precision-recall curves that can be chosen: the mean, then those of the classes.

    `curves` has by name the precision at 101 recalls. A class without ground truth has none.
    """
    metrics_of = {metrics["name"]: metrics for metrics in classes}
    choices = []
    for name, curve in curves.items():
        metrics = metrics_of.get(name)
        lines = [curve["AP50"], curve["AP"]]
        choice = {"name": name, "lines": lines, "best": None, "text": ""}
        if metrics is not None:
            best = metrics["best_f1"]
            choice["text"] = f"AP50 {metric_text(metrics['AP50'])}, AP {metric_text(metrics['AP'])}"
            if best["score"] >= 0:
                choice["best"] = {"recall": best["recall"], "precision": best["precision"]}
                choice["text"] += f", best F1 {best['f1']:.3f} from score {best['score']:.3f}"
        choices.append(choice)
    return choices


def positions(choices: Sequence[dict]) -> dict[str, int]:
    """Return the position of each name among the curves that can be chosen."""
    return {choice["name"]: position for position, choice in enumerate(choices)}


def confusion_table(confusion: Mapping[str, object] | None) -> dict | None:
    """Return a confusion matrix as the page shows it, None where there is none.

    Each cell has its count and, as the strength of its colour, its share of the row; in the last
    row, of false detections, its share of the column, as in `confusion.png`.
    """
    if not confusion:
        return None
    names = confusion["names"]
    rows = []
    largest = []
    shares_of_cells = confusion_shares(np.array(confusion["counts"])).tolist()
    for truth, counts, shares in zip(names, confusion["counts"], shares_of_cells, strict=True):
        cells = []
        for detected, count, share in zip(names, counts, shares, strict=True):
            cells.append({"count": count, "strength": f"{share:.2f}"})
            if count and truth != detected:
                largest.append(
                    {
                        "truth": NO_BOX if truth == BACKGROUND_NAME else truth,
                        "detected": NO_DETECTION if detected == BACKGROUND_NAME else detected,
                        "count": count,
                        "share": share,
                    }
                )
        rows.append(cells)
    largest.sort(key=lambda row: -row["count"])
    return {
        "names": names,
        "rows": rows if len(names) <= MOST_CLASSES else [],
        "dense": len(names) > READABLE_CLASSES,
        "largest": largest[:CONFUSIONS_LISTED],
        "min_score": confusion["min_score"],
        "iou": confusion["iou"],
    }


def error_rows(errors: Mapping[str, dict]) -> list[dict]:
    """Return the types of errors with what each costs, and its share of what the dearest costs."""
    dearest = max((error["dAP"] for error in errors.values()), default=0)
    rows = []
    for name, error in errors.items():
        share = error["dAP"] / dearest if dearest > 0 else 0
        rows.append({"name": name, "meaning": ERROR_TYPES[name], **error, "share": share})
    return rows


def read_picture(path: Path) -> str | None:
    """Return a picture as an address that holds its data, None where there is no such file."""
    if not path.exists():
        return None
    with Image.open(path) as picture:
        return embedded(picture)


def embedded(picture: Image.Image) -> str:
    """Return a picture as an address that holds its data: PNG or JPEG, whichever is smaller."""
    jpeg = io.BytesIO()
    picture.convert("RGB").save(jpeg, "JPEG", quality=JPEG_QUALITY)
    png = io.BytesIO()
    picture.save(png, "PNG")
    kind, data = "jpeg", jpeg.getvalue()
    if len(png.getvalue()) < len(data):
        kind, data = "png", png.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
