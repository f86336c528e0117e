"""Which commands of the pages there are, and which of them run where there is no hub, no GPU and no endpoint."""

import doctest
import os
import re

import pytest

from docs_pages import commands

COMMANDS = [
    command
    for page in commands.pages()
    for command in commands.read(page.relative_to(commands.ROOT).as_posix(), page.read_text(encoding="utf-8"))
]
PAGE = """
```
prefalign train --config=dpo:model=MODEL,data=DATA \\
  --workdir=runs/dpo  # minutes
step 1/9
--config.seed=1
```

```python
prefalign = "no command"
```

- In a list:

  ```bash
  JAX_PLATFORMS=cpu python scripts/benchmark.py cost --out=FILE.json
  ```

With `prefalign judge` or `prefalign report ...` nothing is asked; `prefalign report
runs/dpo` asks. `python` alone does not.

```
prefalign train --config=EXPERIMENT --process=0    # here
prefalign train --config=EXPERIMENT --process=1
```
"""


def test_commands_are_told_from_output_options_and_other_languages():
    texts = [(command.line, command.text) for command in commands.read("a.md", PAGE)]
    assert texts == [
        (3, "prefalign train --config=dpo:model=MODEL,data=DATA --workdir=runs/dpo"),
        (16, "JAX_PLATFORMS=cpu python scripts/benchmark.py cost --out=FILE.json"),
        (19, "prefalign report runs/dpo"),
        (23, "prefalign train --config=EXPERIMENT --process=0 & prefalign train --config=EXPERIMENT --process=1"),
    ]
    assert doctest.testmod(commands).failed == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prefalign train --config=dpo:model=MODEL,data=DATA", ""),
        ("prefalign train --config=dpo:model=MODEL,data=HARMLESS", "HARMLESS: give it"),
        ("prefalign judge-bench --data BENCHMARKS --judge=logp:MODEL", "BENCHMARKS: give it"),
        ("prefalign judge --judge=endpoint:URL", "an endpoint"),
        ("python scripts/benchmark.py gpu --out=DIR", "a GPU"),
        ('pip install -e ".[cuda]"', "a GPU"),
        ("prefalign train --config=experiments/handbook/zephyr_7b_dpo.py", "a model of the hub"),
        ("prefalign plan --config=experiments/handbook/zephyr_7b_dpo.py --model=mistral-7b --device=h200", ""),
        ("python scripts/benchmark.py cost --out=FILE.json", ""),
        ("prefalign report runs/frontier", "hours: --full"),
        ("prefalign report runs/frontier_of_mine", ""),
        ("prefalign train --config=dpo:model=MODEL,data=DATA --workdir=runs/frontier", ""),
    ],
)
def test_why_a_command_does_not_run(text, reason):
    for fresh in (False, True):
        assert commands.missing(text, commands.GIVEN, fresh, {"runs/frontier": "hours: --full"}) == reason


def test_packages_are_installed_where_that_is_asked_for():
    text = 'pip install -e ".[test]" && python -m pytest -n 2'
    assert commands.missing(text, commands.GIVEN, fresh=False, left={}) == "the package index: --fresh"
    assert commands.missing(text, commands.GIVEN, fresh=True, left={}) == ""


def test_what_runs_is_short_unless_it_is_asked_for_in_full():
    text = "prefalign train --config=dpo:model=MODEL,data=DATA"
    model, data = commands.GIVEN["MODEL"], commands.GIVEN["DATA"]
    assert commands.filled(text, commands.GIVEN, full=True) == f"prefalign train --config=dpo:model={model},data={data}"
    assert commands.filled(text, commands.GIVEN, full=False).endswith(" --config.data.limit=64 --config.warmup_steps=0")
    assert commands.filled("prefalign train --config=quickstart", {}, full=False).endswith("quickstart")
    assert commands.filled("prefalign sweep --config=quickstart", {}, full=False).endswith("quickstart --dry_run")
    assert commands.filled("python scripts/attacks/kills.py 304", {}, full=False) == "python scripts/attacks/kills.py 1"
    loop = "for n in 1 2; do prefalign inspect --out=runs/$n; done"
    assert commands.filled(loop, {}, full=False) == loop.replace(
        "runs/$n", "runs/$n --config.data.limit=64 --config.warmup_steps=0"
    )
    both = commands.filled("prefalign train --process=0 & prefalign train --process=1", {}, full=False)
    assert both.count("--config.data.limit=64") == 2 and both.endswith(" && wait $!")


def test_every_line_that_begins_like_a_command_is_one():
    assert len(COMMANDS) > 100
    for page in commands.pages():
        name = page.relative_to(commands.ROOT).as_posix()
        lines = {command.line for command in COMMANDS if command.page == name}
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            begins = re.match(r" *(prefalign|python3?|pip) (?!is |has )", line)
            assert number in lines or not begins or "--process=1" in line, f"{name}:{number}"


def test_a_word_in_capitals_is_given_or_named_as_missing():
    for command in COMMANDS:
        if not commands.missing(command.text, commands.GIVEN, fresh=True, left={}):
            assert not commands.NAMES.findall(commands.filled(command.text, commands.GIVEN, full=True)), command


def test_a_command_past_its_time_ends_with_what_it_started(tmp_path):
    status, said = commands.run("echo began; sleep 60 & sleep 60", tmp_path, os.environ, 0.3)
    assert (status, said) == ("over time", "began\n")


def checked(tmp_path, monkeypatch, capsys, page: str, **options) -> tuple[int, list[str]]:
    """Status of `check` for a page, and the words of the rows that begin with its name."""
    (tmp_path / "page.md").write_text(page)
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    monkeypatch.setattr(commands, "pages", lambda: [tmp_path / "page.md"])
    monkeypatch.setattr(commands, "copy", lambda directory: None)
    asked = {"given": {}, "full": False, "fresh": False, "only": "", "seconds": 60} | options
    status = commands.check(tmp_path, commands.Options(**asked))
    return status, [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.strip()]


def test_what_became_of_the_commands_of_a_page(tmp_path, monkeypatch, capsys):
    page = "```\n" + "\n".join(
        [
            'python -c \'open("log", "a").write("ran ")\'',
            "python -c 'exit(3)' --out=runs/left",
            "python -c '1' runs/left",
            "export A=1",
            "export A=1",
            "python -c '1' --judge=endpoint:URL\n```\n",
        ]
    )
    status, lines = checked(tmp_path, monkeypatch, capsys, page)
    assert status == 1
    assert "| page.md | 6 | 3 | 1 | 1 | an endpoint 1, one that failed 1 |" in lines
    assert lines[-1] == "6 commands: 3 ran, 1 of them failed; 3 did not"
    # What passed counts again and is not run again.
    status, lines = checked(tmp_path, monkeypatch, capsys, page, only="nothing")
    assert status == 0 and lines[-1] == "6 commands: 2 ran, 0 of them failed; 4 did not"
    assert (tmp_path / "log").read_text() == "ran "
