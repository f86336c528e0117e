import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fake_runs import leave_ablation, leave_run
from prefalign_jax.analysis.compare import final, group_runs, over_seeds, paired
from prefalign_jax.analysis.compare_page import markdown, write_page
from prefalign_jax.analysis.runs import find_runs
from prefalign_jax.types import UserError

ROOT = Path(__file__).parents[1]
VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: its text, tables, links; a tag left open is an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.rows, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if {"td", "th"} & set(self.open) and "script" not in self.open:
            self.rows[-1][-1] += data + " "

    def cells(self):
        return [[" ".join(cell.split()) for cell in row] for row in self.rows]


def page_of(directory, tmp_path, **options):
    path, *pictures = write_page(find_runs([directory]), tmp_path / "out" / "page.html", title="a <b> & c", **options)
    text = path.read_text()
    return Page(text), text, pictures


def test_the_tables_in_markdown_say_what_the_page_says(tmp_path):
    runs = find_runs([leave_ablation(tmp_path / "runs")])
    last, gaps = markdown(runs, metrics=["eval/rewards/accuracies"]).split("\n\n")
    first, second = group_runs(runs)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in (last + "\n" + gaps).splitlines()]
    assert rows[0] == ["", "eval/rewards/accuracies"] and rows[2][0].startswith(first.label)
    estimate = over_seeds(second, lambda run: final(run, "eval/rewards/accuracies"))
    numbers = [float(text.replace("−", "-")) for text in re.findall(r"[−\d.]+", rows[3][1])]
    assert numbers == pytest.approx(list(estimate.interval), abs=0.02)
    assert rows[4][0] == f"minus {first.label}" and rows[6][0] == second.label
    gap = paired(first, second, lambda run: final(run, "eval/rewards/accuracies")).interval.mean
    assert float(rows[6][1].split()[0].replace("−", "-")) == pytest.approx(gap, abs=0.02)
    assert len(markdown(runs[:1]).splitlines()) == 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    return *page_of(leave_ablation(root / "runs"), root), root


def charts_of(text):
    (data,) = re.findall(r'<script type="application/json" id="charts">(.*?)</script>', text, re.DOTALL)
    return json.loads(data)


def test_the_page_is_whole_and_asks_the_network_for_nothing(made):
    page, text, pictures, _ = made
    links = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "data", "action")]
    assert links and all(value.startswith("#") for value in links)
    assert not re.search(r"@import|url\((?!#)|<script src|<link|<image|XMLHttpRequest|fetch\(|WebSocket|\beval\(", text)
    targets = {value for _, name, value in page.attributes if name == "id"}
    assert {value[1:] for tag, name, value in page.attributes if (tag, name) == ("a", "href")} <= targets
    data = charts_of(text)
    curves = [curves for panel in data["panels"] for curves in panel["curves"] if curves]
    assert len(pictures) == len(curves) > 4 and text.count("<figure>") == len(data["panels"]) == 4
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert len(text) < 150_000


def test_charts_hold_bands_units_and_the_lines_to_read_them_by(made):
    data = charts_of(made[1])
    assert [group["label"] for group in data["groups"]] == ["beta=0.1", "beta=0.3"]
    assert len({(group["colour"], *group["dash"]) for group in data["groups"]}) == 2
    assert [column["label"] for column in data["columns"]] == ["steps", "trained tokens", "seconds of training"]
    loss, accuracy, training, _ = data["panels"]
    assert (accuracy["title"], accuracy["unit"]) == ("rewards/accuracies, held out", "share of pairs")
    assert accuracy["marks"] == [[0.5, "0.5: chance"]] and loss["points"] and not training["points"]
    x, mean, low, high = loss["curves"][0][0]
    assert x == [*range(0, 21, 2)] and mean[0] == 1 and mean[-1] == 0.55 and low[-1] < 0.5 < 0.61 < high[-1]
    assert training["curves"][1:] == [None, None] and "95% interval over 3 seeds" in loss["captions"][0]


def test_whoever_copies_the_page_copies_the_licence_of_what_draws_it(made):
    assert "Copyright (c) 2022 Leon Sorokin" in made[1] and "uPlot (v1.6.32)" in made[1]


def test_tables_hold_means_intervals_and_paired_differences(made):
    cells = made[0].cells()
    assert ["metric", "beta=0.1", "beta=0.3"] in cells
    assert ["eval/loss", "0.55 [0.41, 0.69] n = 3", "0.430 [0.340, 0.520] n = 3"] in [
        [re.sub(r"(\d\.\d\d)\d*", r"\1", c) if n == 1 else c for n, c in enumerate(row)] for row in cells
    ]
    assert ["metric", "beta=0.3 − beta=0.1"] in cells
    (gap,) = (row for row in cells if row[0] == "eval/rewards/accuracies" and len(row) == 2)
    assert gap[1].startswith("+0.060 [") and gap[1].endswith("n = 3")


def test_losses_at_two_betas_are_shown_but_not_compared(made):
    page, *_ = made
    assert not [row for row in page.cells() if row[0] == "eval/loss" and len(row) == 2]
    assert any("Not compared: eval/loss." in word for word in page.words)


def test_what_is_missing_is_said(made):
    words = " ".join(made[0].words)
    assert "Not all runs count their operations: equal compute is by trained tokens and by seconds." in words
    assert "All runs end at 20 steps" in words and "At 20 seconds of training" in words


def test_runs_table_shows_what_differs_and_each_config_can_be_opened(made):
    page, text, *_ = made
    assert ["beta=0.3-seed=2", "beta=0.3", "2", "0.3"] in [row[:4] for row in page.cells()]
    assert text.count(": whole config</summary>") == 6 and "batch_size: 4" in text


def test_the_same_runs_make_the_same_page(made):
    _, text, _, root = made
    assert page_of(root / "runs", root / "again")[1] == text


def test_whatever_the_data_say_is_text(tmp_path):
    evil = "<script>alert(1)</script>&\"'$x_$"
    for number in range(2):
        leave_run(tmp_path / "runs" / f"<i>{number}", note=evil + str(number), loss={"name": "_" + evil})
    page, text, _ = page_of(tmp_path / "runs", tmp_path)
    assert "<script>alert" not in text and "<i>" not in text and "a <b> & c" in page.words
    assert any(evil in word for word in page.words)


def test_one_run_makes_a_page_of_its_own(tmp_path):
    page, _, pictures = page_of(leave_run(tmp_path / "run"), tmp_path)
    assert ["eval/loss", "1", "0.5", ""] in page.cells()
    assert ["eval/rewards/accuracies", "0.75", "0.75", "[0.100, 0.900]"] in page.cells()
    assert any("nothing here says how much another seed would change" in word for word in page.words)
    assert pictures


def test_unfinished_runs_are_named_and_left_out(tmp_path):
    leave_ablation(tmp_path / "runs")
    leave_run(tmp_path / "runs" / "late", seed=9, end=12)
    page, *_ = page_of(tmp_path / "runs", tmp_path)
    assert any("1 of 7 runs are unfinished" in word and "late (step 12 of 20)" in word for word in page.words)
    assert not any(row[0] == "late" for row in page.cells())
    with pytest.raises(UserError, match="none of 1 run"):
        write_page(find_runs([tmp_path / "runs" / "late"]), tmp_path / "p.html", title="t")


def test_seeds_that_agree_get_no_interval_of_no_width(tmp_path):
    for seed in range(3):
        leave_run(tmp_path / "runs" / str(seed), seed=seed)
    page, *_ = page_of(tmp_path / "runs", tmp_path)
    assert ["eval/loss", "0.5 n = 3, all equal"] in page.cells()


def test_without_held_out_data_training_stands_in_and_says_so(tmp_path):
    for seed in range(2):
        (leave_run(tmp_path / "runs" / str(seed), seed=seed) / "eval.jsonl").unlink()
    page, *_ = page_of(tmp_path / "runs", tmp_path)
    assert any("No run has held-out data" in word for word in page.words)
    assert ["loss", "0.8 n = 2, all equal"] in page.cells()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"metrics": ["eval/los"]}, "--metrics: no run has 'eval/los'; did you mean 'eval/loss'?"),
        ({"columns": ["second"]}, "--x: not every run says its 'second'; did you mean 'seconds'?"),
        ({"group_by": ["bta"]}, "--group_by: the configs have no field 'bta'"),
    ],
)
def test_mistakes_are_one_line(options, says, tmp_path):
    with pytest.raises(UserError) as error:
        page_of(leave_ablation(tmp_path / "runs"), tmp_path, **options)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_metrics_and_columns_are_those_asked_for(tmp_path):
    leave_ablation(tmp_path / "runs")
    page, text, pictures = page_of(tmp_path / "runs", tmp_path, metrics=["eval/loss"], columns=["seconds"])
    assert "eval/rewards/accuracies" not in {row[0] for row in page.cells()}
    assert {path.stem.split("-")[1] for path in pictures} == {"step", "seconds"}


@pytest.mark.everything
def test_the_script_says_what_it_wrote_and_what_is_wrong(tmp_path):
    def report(*arguments):
        command = [sys.executable, "scripts/report.py", *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    leave_run(tmp_path / "run")
    out = report(tmp_path / "run", "--metrics=eval/loss")
    assert out.returncode == 0 and (tmp_path / "run" / "report.html").exists() and "report.html" in out.stdout
    for wrong in ([tmp_path / "none"], [], [tmp_path / "run", "--group=x"]):
        out = report(*wrong)
        assert out.returncode == 2 and out.stderr.startswith("error: ") and out.stderr.count("\n") == 1


def test_many_groups_are_rows_and_samples_are_compared_between_losses(tmp_path):
    names = ("dpo", "orpo", "ipo", "simpo", "kto", "cpo", "hinge")
    for name in names:
        for seed in range(2):
            run = leave_run(tmp_path / "runs" / f"{name}-{seed}", seed=seed, loss={"name": name}, cost=1.0 + seed)
            rows = [{"step": step, "eval/loss": 1.0, "samples/kl": step + seed / 10} for step in (0, 20)]
            (run / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page, text, _ = page_of(tmp_path / "runs", tmp_path, columns=["seconds"], metrics=["eval/loss", "samples/kl"])
    cells = page.cells()
    assert ["group", "eval/loss", "samples/kl"] in cells and [row[0] for row in cells if len(row) == 3][1:8] == [
        *sorted(names)
    ]
    assert ["group", "samples/kl"] in cells and any(row[0] == "dpo − cpo" and len(row) == 2 for row in cells)
    assert "Not compared: eval/loss." in " ".join(page.words)


def test_where_nothing_can_be_compared_there_is_no_empty_table(tmp_path):
    for number in range(2):
        leave_run(tmp_path / "runs" / str(number), loss={"name": "dpo", "beta": 0.1 + number})
    page, text, _ = page_of(tmp_path / "runs", tmp_path, metrics=["eval/loss"], columns=["seconds"])
    assert "No metric is the same quantity in all groups." in page.words
    assert not re.search(r"<tbody>\s*</tbody>", text)


# What a reader does, by the page's own listeners; the answer goes where --dump-dom shows it.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WATCH = "<script>const errors = []; addEventListener('error', event => errors.push(event.message));</script>"
READER = """<script>
addEventListener("load", () => {
  const chart = document.querySelector(".chart"), get = id => document.getElementById(id), all = get("all");
  const press = key => {
    chart.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
    return get("said").textContent;
  };
  chart.focus();
  const drawn = () => ["figure:not([hidden])", ".chart canvas"].map(what => document.querySelectorAll(what).length);
  const seen = {drawn: drawn()};
  seen.first = press("Home");
  seen.last = press("End");
  document.querySelector(".key input").click();
  seen.hidden = press("End");
  get("every").click();
  seen.again = press("End");
  press("+");
  seen.zoomed = !all.disabled;
  press("0");
  seen.whole = all.disabled;
  const columns = document.querySelectorAll("input[name=column]");
  columns[columns.length - 1].click();
  seen.anew = drawn();
  document.title = JSON.stringify({...seen, errors});
});
</script>"""


@pytest.mark.everything
def test_in_a_browser_curves_are_drawn_read_hidden_zoomed_and_drawn_anew(tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no browser is installed")
    (page, *_) = write_page(find_runs([leave_ablation(tmp_path / "runs")]), tmp_path / "page.html", title="runs")
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text())  # which lets no script run but the page's own
    page.write_text(text.replace("<head>", "<head>" + WATCH, 1).replace("</body>", READER + "</body>", 1))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--window-size=1280,900", "--virtual-time-budget=3000", "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", shown)[1]))
    assert seen["errors"] == [] and seen["drawn"] == [4, 4]
    assert seen["anew"] == [2, 2]  # by time, which only rows of training have
    assert seen["first"].startswith("0 steps; ") and seen["last"].startswith("20 steps; ")
    assert all(f"beta={beta}: " in seen["last"] for beta in (0.1, 0.3)) and seen["again"] == seen["last"]
    assert "beta=0.1" not in seen["hidden"] and "beta=0.3: " in seen["hidden"]
    assert seen["zoomed"] and seen["whole"]
