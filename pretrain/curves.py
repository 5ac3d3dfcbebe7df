"""The curves of runs as one picture: python -m pretrain.curves RUN/metrics.jsonl --out curves.png.

`--panels loss blank_rate cer wer` draws these metrics, one a panel, in the place of those of pre-training.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wavlm_jax.extras import extra
from wavlm_jax.files import named

Record = Mapping[str, Any]

PANELS = (
    ("cross entropy of masked frames (nats)", ("masked_loss",)),
    ("accuracy on masked frames", ("masked_accuracy",)),
    ("gradient norm", ("grad_norm",)),
    ("entropy on masked frames (nats)", ("prediction_entropy", "label_entropy")),
)
"""Title of each panel and the metrics it shows, of training and of every evaluation split, in reading order."""


def read_records(path: Path) -> list[Record]:
    """The metrics of a run, one object a line; those of an evaluation are named after their split ("valid/loss").

    Raises:
        ValueError: for a line that is no JSON object, with its number.

    """
    records: list[Record] = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason}), expected the metrics.jsonl of a run") from error
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{number}: not a JSON line ({error}); was the run cut while writing it?"
            ) from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: found {type(record).__name__}, expected an object")
        split = str(record.get("kind", "")).partition("/")[2]
        records.append({f"{split}/{key}" if split and key != "step" else key: record[key] for key in record})
    return records


def series(records: Sequence[Record], name: str) -> tuple[list[int], list[float]]:
    """Steps and values at which a metric was written."""
    points = [(record["step"], record[name]) for record in records if name in record]
    return [step for step, _ in points], [value for _, value in points]


def names(records: Sequence[Record], metrics: Sequence[str]) -> list[str]:
    """The names under which `metrics` were written: bare, or after the name of a split ("valid/masked_loss")."""
    written = sorted({name for record in records for name in record})
    return [name for name in written if name.rpartition("/")[2] in metrics]


def _insist(runs: Mapping[str, Sequence[Record]], panels: Sequence[tuple[str, tuple[str, ...]]]) -> None:
    for title, metrics in panels:
        if not any(names(records, metrics) for records in runs.values()):
            known = sorted(
                {name.rpartition("/")[2] for records in runs.values() for record in records for name in record}
            )
            raise ValueError(f"{title}: in none of {', '.join(runs)}; they have {', '.join(known)}")


def draw(
    runs: Mapping[str, Sequence[Record]],
    out: Path,
    levels: Mapping[str, float] | None = None,
    panels: Sequence[tuple[str, tuple[str, ...]]] = PANELS,
) -> None:
    """A PNG with one panel for each of `panels`; several runs share the axes.

    Args:
        runs: records by the name that the legend shows.
        out: where the PNG goes.
        levels: horizontal lines on the accuracy panel, by name (unigram accuracy).
        panels: like `PANELS`.

    Raises:
        ValueError: no run has any metric of a panel.
        MissingExtraError: matplotlib is not installed.

    """
    _insist(runs, panels)
    with extra("demo", "the picture of curves"):
        import matplotlib as mpl  # noqa: PLC0415

        mpl.use("Agg")
        from matplotlib import pyplot as plt  # noqa: PLC0415
    lines = -(-len(panels) // 2)
    figure, axes = plt.subplots(lines, 2, figsize=(11, 3.5 * lines), constrained_layout=True, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, metrics) in zip(axes.flat, panels, strict=False):
        for index, (run, records) in enumerate(runs.items()):
            for number, name in enumerate(names(records, metrics)):
                style: dict[str, str] = {"marker": "." if "/" in name else "", "label": name}
                if len(runs) > 1:  # a colour a run, which the legend names once; its evaluations have dots
                    style |= {"color": f"C{index}", "label": "" if number else run}
                axis.plot(*series(records, name), **style)
        for name, level in (levels or {}).items():
            if "accuracy" in title:
                axis.axhline(level, linestyle=":", color="grey", label=name)
        axis.set(title=title, xlabel="updates")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    """Read the runs named on the command line and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("metrics", nargs="+", type=named, help="metrics.jsonl of one or more runs")
    parser.add_argument("--out", type=named, required=True, help="the PNG to write")
    parser.add_argument("--panels", nargs="+", metavar="METRIC", help="what to draw (default: pre-training's curves)")
    arguments = parser.parse_args()
    panels = [(metric, (metric,)) for metric in arguments.panels] if arguments.panels else PANELS
    try:
        draw({str(path.parent): read_records(path) for path in arguments.metrics}, arguments.out, panels=panels)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(arguments.out)


if __name__ == "__main__":
    main()
