import json
import os

import numpy as np
import pytest

from fake_runs import leave_ablation, leave_run
from prefalign_jax.analysis.runs import (
    MARK,
    differing,
    find_runs,
    last_row,
    latest_stage,
    read_metrics,
    totals,
)
from prefalign_jax.files import write_json
from prefalign_jax.types import UserError


def test_rows_are_read_as_written_and_a_missing_file_is_empty(tmp_path):
    rows = [{"step": 1, "é": 0.5}, {"step": 2, "loss": None}]
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert read_metrics(file) == rows
    assert read_metrics(tmp_path / "eval.jsonl") == []
    assert last_row(file) == rows[-1] and last_row(tmp_path / "eval.jsonl") == {}


def test_a_line_that_is_being_written_is_no_row_yet_and_a_broken_one_is_an_error(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert read_metrics(file) == [{"step": 1}, {"step": 2}] and last_row(file) == {"step": 2}
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, row 2: expected JSON"):
        read_metrics(file)


ROWS = ["[1]", "3", "{}", '{"step": "1"}', '{"step": 1.5}', '{"step": 1, "loss": "0.5"}', f'{{"step": 1{"0" * 4000}}}']
ROWS += ['{"step": 1, "x": ' + "[" * 5000 + "]" * 5000 + "}"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[:25])
def test_valid_json_of_another_shape_is_named(tmp_path, row):
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 0}}\n{row}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, row 2(, field '\w+')?: (expected|it has no)") as error:
        read_metrics(file)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert last_row(file) == {}


@pytest.mark.parametrize("mark", ["[]", "{}", '{"done": 5}', '{"done": {}}', '{"done": null, "overrides": []}', "{"])
def test_a_mark_of_another_shape_is_named(tmp_path, mark):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "point.json").write_text(mark)
    with pytest.raises(UserError, match=r"point\.json(, field '\w+')*: (expected|it has no)"):
        find_runs([tmp_path])


def test_the_last_row_of_a_long_file_is_found_at_its_end(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": n, "y" * 100: 0.5}) + "\n" for n in range(5000)))
    assert last_row(file)["step"] == 4999


def test_totals_add_up_what_the_rates_say():
    """Ten steps of 0.5 s after a first of 4 s, and 7 tokens a step throughout."""
    rows = [{"step": 1, "step_time": 4.0, "tokens_per_second": 7 / 4, "flops": 10, "other": 1.0}]
    rows += [{"step": n, "step_time": 0.5, "tokens_per_second": 14.0, "flops": 50} for n in (6, 11)]
    of = totals(rows)
    assert of.keys() == {"step", "seconds", "tokens", "flops"}
    np.testing.assert_allclose(of["seconds"], [4.0, 6.5, 9.0])
    np.testing.assert_allclose(of["tokens"], [7, 42, 77])
    np.testing.assert_allclose(of["flops"], [10, 60, 110])
    del rows[1]["tokens_per_second"]
    assert totals(rows).keys() == {"step", "seconds", "flops"} and totals([]) == {}


def test_runs_are_found_wherever_they_lie(tmp_path):
    leave_ablation(tmp_path / "many")
    assert [run.name for run in find_runs([tmp_path / "many"])][:2] == ["beta=0.1-seed=0", "beta=0.1-seed=1"]
    (one,) = find_runs([tmp_path / "many" / "beta=0.1-seed=0"])
    assert one.name == "beta=0.1-seed=0" and one.config["loss.beta"] == 0.1 and one.finished
    both = find_runs([tmp_path / "many", leave_run(tmp_path / "more")])
    assert len(both) == 7 and both[-1].name == "more" and both[0].name == "many/beta=0.1-seed=0"
    for wrong, says in ((tmp_path / "none", "no such directory"), (tmp_path / "many" / "empty", "no run is there")):
        if says == "no run is there":
            wrong.mkdir()
        with pytest.raises(UserError, match=says):
            find_runs([wrong])


def test_of_a_point_with_stages_the_one_that_its_mark_names_counts(tmp_path):
    for number, stage in enumerate(("dpo", "sft")):
        leave_run(tmp_path / "p" / stage)
        os.utime(tmp_path / "p" / stage / "metrics.jsonl", (number, number))
    assert latest_stage(tmp_path / "p") == tmp_path / "p" / "sft"
    write_json(tmp_path / "p" / MARK, {"done": {"run": "dpo"}})
    assert [run.name for run in find_runs([tmp_path])] == ["p/dpo"]
    write_json(tmp_path / "p" / MARK, {"done": None})
    assert [run.name for run in find_runs([tmp_path])] == ["p/sft"]


def test_a_run_that_has_not_reached_its_last_step_is_unfinished(tmp_path):
    leave_run(tmp_path / "a", end=10)
    (run,) = find_runs([tmp_path])
    assert not run.finished and run.train[-1]["step"] == 10


def test_the_fields_that_differ(tmp_path):
    leave_run(tmp_path / "a", seed=0)
    leave_run(tmp_path / "b", seed=1, loss={"name": "orpo", "lam": 0.1})
    assert differing(find_runs([tmp_path])) == ["loss.name", "seed", "loss.beta", "loss.lam"]


def test_steps_that_follow_from_epochs_are_no_difference(tmp_path):
    leave_run(tmp_path / "a", steps=10)
    leave_run(tmp_path / "b", steps=12)
    runs = find_runs([tmp_path])
    assert differing(runs) == ["steps"]
    assert differing([run._replace(config={**run.config, "epochs": 2.0}) for run in runs]) == []
