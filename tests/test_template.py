"""What a chat template is told: a date that stays, variables that it reads, options as a user writes them."""

import datetime
import json

import pytest

from prefalign_jax import experiment as experiment_
from prefalign_jax.config import defaults
from prefalign_jax.data.template import ChatOptions, Template, chat_options, prints_date, template_kwargs
from prefalign_jax.experiment import read
from prefalign_jax.types import UserError
from templates import JINJA, tokenizer_of, tokenizer_with

ASKED = [{"role": "user", "content": "Hi"}]
LEAP = datetime.date(2024, 2, 29)
FORMATS = ("%d %b %Y", "%Y-%m-%d", "%A, %B %d", "%-d.%-m.%y", "day %j of %Y, 100%%")


@pytest.mark.parametrize("format", FORMATS)
def test_a_template_prints_the_day_that_it_is_told(format):
    tokenizer = tokenizer_with(f"{{{{ strftime_now('{format}') }}}} " + JINJA["chatml"])
    text = Template(tokenizer, ChatOptions(day=LEAP)).render(ASKED)
    assert text.startswith(f"{LEAP.strftime(format)} <|im_start|>") and prints_date(tokenizer)
    assert Template(tokenizer, ChatOptions()).render(ASKED).startswith(datetime.date.today().strftime(format))


@pytest.mark.parametrize(
    ("jinja", "printed"),
    [
        ("{{ date_string }} ", "29 Feb 2024 "),
        ("{% if date_string %}{{ date_string }}{% endif %} ", "29 Feb 2024 "),
        (
            "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }} ",
            "26 Jul",
        ),
        ("{{ date_string | default('26 Jul 2024') }} ", "26 Jul 2024 "),
    ],
)
def test_a_date_that_a_template_has_of_its_own_stays(jinja, printed):
    tokenizer = tokenizer_with(jinja + JINJA["chatml"])
    assert Template(tokenizer, ChatOptions(day=LEAP)).render(ASKED).startswith(printed)
    assert prints_date(tokenizer) == printed.startswith("29")


def test_templates_that_print_no_date_and_those_with_several_forms_are_told_apart():
    assert not prints_date(tokenizer_of("chatml"))
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = {"default": JINJA["chatml"], "tool_use": "{{ strftime_now('%Y') }}"}
    assert prints_date(tokenizer)


class Day(datetime.date):
    """A day that goes on when it is told to."""

    now = datetime.date(2030, 1, 1)

    @classmethod
    def today(cls):
        return cls.now


def test_a_run_keeps_its_date_over_midnight(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment_.datetime, "date", Day)
    config = defaults("dpo")
    config.model.path, config.data.path = "MODEL", "rows.jsonl"
    began = read(config).dated(tmp_path)
    assert began.chat.day.isoformat() == began.config.data.date == "2030-01-01"
    (tmp_path / "config.json").write_text(json.dumps(began.plain))
    monkeypatch.setattr(Day, "now", datetime.date(2030, 1, 2))
    assert read(config).dated(tmp_path).chat == began.chat  # resumed
    assert read(config).dated(tmp_path / "other").chat.day.isoformat() == "2030-01-02"
    config.data.date = "2024-02-29"
    assert read(config).dated(tmp_path).chat.day == LEAP


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"date": "29.2.2024"}, "data.date='29.2.2024': write a day as YYYY-MM-DD"),
        ({"template_may_drop": "thoughts"}, "data.template_may_drop='thoughts' is unknown"),
        ({"special_in_text": "drop"}, "data.special_in_text='drop' is unknown"),
        ({"chat_template_kwargs": "[1]"}, "data.chat_template_kwargs: expected an object"),
        ({"chat_template_kwargs": "{"}, "data.chat_template_kwargs: expected a JSON object"),
        ({"chat_template_kwargs": {"tools": []}}, "'tools' is no variable of a chat template that may be set"),
        ({"chat_template_kwargs": {"a b": 1}}, "'a b' is no variable of a chat template that may be set"),
    ],
)
def test_an_option_that_is_wrong_is_one_line(options, says):
    with pytest.raises(UserError) as caught:
        chat_options(**options)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_options_are_the_same_however_they_are_written():
    given = {"b": [1], "a": False}
    assert template_kwargs(given) == template_kwargs(json.dumps(given)) == (("a", False), ("b", [1]))
    assert chat_options() == chat_options("", "", "", "") == chat_options({}, None, None, "keep") == ChatOptions()
