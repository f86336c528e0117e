"""Which commands of the pages there are, and which of them run where there is no hub, no GPU and no endpoint."""

import doctest
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
"""


def test_commands_are_told_from_output_options_and_other_languages():
    texts = [(command.line, command.text) for command in commands.read("a.md", PAGE)]
    assert texts == [
        (3, "prefalign train --config=dpo:model=MODEL,data=DATA --workdir=runs/dpo"),
        (16, "JAX_PLATFORMS=cpu python scripts/benchmark.py cost --out=FILE.json"),
    ]
    assert doctest.testmod(commands).failed == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("prefalign train --config=dpo:model=MODEL,data=DATA", ""),
        ("prefalign train --config=dpo:model=MODEL,data=HARMLESS", "HARMLESS: give it"),
        ("prefalign judge-bench --data BENCHMARKS --judge=logp:MODEL", "BENCHMARKS: give it"),
        ("prefalign judge --judge=endpoint:URL", "an endpoint"),
        ('pip install -e ".[test]" && python -m pytest -n 2', "the package index"),
        ("python scripts/benchmark.py gpu --out=DIR", "a GPU"),
        ("python scripts/benchmark.py cost --out=FILE.json", "minutes: --full"),
        ("prefalign report runs/frontier", "runs/frontier, which a command before did not write here"),
        ("prefalign report runs/frontier_of_mine", ""),
        ("prefalign train --config=dpo:model=MODEL,data=DATA --workdir=runs/frontier", ""),
    ],
)
def test_why_a_command_does_not_run(text, reason):
    assert commands.missing(text, commands.GIVEN, full=False, left=["runs/frontier"]) == reason


def test_what_runs_is_short_unless_it_is_asked_for_in_full():
    text = "prefalign train --config=dpo:model=MODEL,data=DATA"
    model, data = commands.GIVEN["MODEL"], commands.GIVEN["DATA"]
    assert commands.filled(text, commands.GIVEN, full=True) == f"prefalign train --config=dpo:model={model},data={data}"
    assert commands.filled(text, commands.GIVEN, full=False).endswith(" --config.data.limit=64 --config.warmup_steps=0")
    assert commands.filled("prefalign train --config=quickstart", {}, full=False).endswith("quickstart")


def test_every_line_that_begins_like_a_command_is_one():
    assert len(COMMANDS) > 40
    for page in commands.pages():
        name = page.relative_to(commands.ROOT).as_posix()
        lines = {command.line for command in COMMANDS if command.page == name}
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            assert number in lines or not re.match(r" *(prefalign|python3?|pip) (?!is |has )", line), f"{name}:{number}"


def test_a_word_in_capitals_is_given_or_named_as_missing():
    for command in COMMANDS:
        if not commands.missing(command.text, commands.GIVEN, full=True):
            assert not commands.NAMES.findall(commands.filled(command.text, commands.GIVEN, full=True)), command
