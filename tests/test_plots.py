import json

import matplotlib.axes
import matplotlib.image
import numpy as np
import pytest

from prefalign_jax.pages.plots import HELD_OUT as RED
from prefalign_jax.pages.plots import TRAINING, edges_around_zero, plot_curves, plot_margins

TRAIN = [
    {"step": step, "loss": 0.7 - 0.1 * step, "rewards/accuracies": 0.5, "rewards/margins": 0.1 * step, "grad_norm": 2.0}
    | {"learning_rate": 1e-3, "logps/chosen": -9.0, "logps/rejected": -8.0 - step}
    for step in (1, 2, 3)
]
HELD_OUT = [
    {"step": 0, "eval/loss": 0.7, "eval/rewards/accuracies": 0.5},
    {"step": 3, "eval/loss": 0.6, "eval/logps/rejected": -7.0},
]


def write(directory, train, held_out=None):
    for name, rows in (("metrics", train), ("eval", held_out)):
        if rows is not None:
            (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn, {(panel, colour, style): [(step, value), ...]}, filled as plot_curves runs."""
    lines = {}
    plot, title = matplotlib.axes.Axes.plot, matplotlib.axes.Axes.set_title

    def record(axes, *args, **options):
        line, *_ = plot(axes, *args, **options)
        axes.recorded = [*getattr(axes, "recorded", []), line]
        return [line]

    def finish(axes, text, **options):
        for line in getattr(axes, "recorded", []):
            lines[text, line.get_color(), line.get_linestyle()] = [tuple(point) for point in line.get_xydata()]
        return title(axes, text, **options)

    monkeypatch.setattr(matplotlib.axes.Axes, "plot", record)
    monkeypatch.setattr(matplotlib.axes.Axes, "set_title", finish)
    return lines


def test_the_picture_is_a_png_of_some_size(tmp_path):
    path = plot_curves(write(tmp_path, TRAIN, HELD_OUT))
    assert path == tmp_path / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    picture = matplotlib.image.imread(path)
    assert min(picture.shape[:2]) > 400
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 100


def test_every_column_is_drawn_where_it_belongs(tmp_path, drawn):
    plot_curves(write(tmp_path, TRAIN, HELD_OUT))
    assert [title for title, colour, style in drawn if (colour, style) == (TRAINING, "-")] == [
        *["loss", "accuracy", "reward margin", "log-probability of chosen and rejected", "gradient norm"],
        "learning rate",
    ]
    assert drawn["loss", TRAINING, "-"] == [(row["step"], row["loss"]) for row in TRAIN]
    assert drawn["loss", RED, "-"] == [(0, 0.7), (3, 0.6)]
    assert drawn["accuracy", RED, "-"] == [(0, 0.5)]
    logps = "log-probability of chosen and rejected"
    assert drawn[logps, TRAINING, "--"] == [(row["step"], row["logps/rejected"]) for row in TRAIN]
    assert drawn[logps, RED, "--"] == [(3, -7.0)]
    assert (logps, RED, "-") not in drawn


def test_columns_that_a_run_lacks_are_left_out(tmp_path, drawn):
    """Supervised fine-tuning has no margins, and a value may be missing in some rows."""
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0, "grad_norm": 4.0}]
    assert plot_curves(write(tmp_path, rows)).exists()
    assert drawn == {
        ("loss", TRAINING, "-"): [(1, 2.0), (3, 1.0)],
        ("gradient norm", TRAINING, "-"): [(3, 4.0)],
    }


def test_a_run_drawn_again_replaces_its_picture(tmp_path):
    first = plot_curves(write(tmp_path, TRAIN[:2])).read_bytes()
    assert plot_curves(write(tmp_path, TRAIN)).read_bytes() != first


@pytest.mark.parametrize("values", [[0.5, 3.0], [-2.0, -0.1], [-1.0, 0.0, 2.5], [0.0], [1e-9, -4e-9], [-1e5, 1e-3]])
def test_margins_either_side_of_zero_share_no_bar(values):
    values = np.array(values)
    edges = edges_around_zero(values)
    assert 0.0 in edges
    assert edges[0] <= values.min() and values.max() < edges[-1]
    np.testing.assert_allclose(np.diff(edges), edges[1] - edges[0])
    assert len(edges) < 45


def test_margins_are_counted_by_their_sign(monkeypatch, tmp_path):
    bars = {}
    hist = matplotlib.axes.Axes.hist

    def recorded(self, values, edges, **options):
        bars[options["label"]] = hist(self, values, edges, **options)[0].sum()

    monkeypatch.setattr(matplotlib.axes.Axes, "hist", recorded)
    plot_margins(tmp_path / "m.png", np.array([1.0, 2.0, -1.0, 0.0, 0.3]))
    assert bars == {"3 right": 3, "2 wrong": 2}
    assert matplotlib.image.imread(tmp_path / "m.png").ndim == 3
    assert [path.name for path in tmp_path.iterdir()] == ["m.png"]
