"""The fields of an experiment: what follows the colon of --config, and the defaults."""

import inspect
import re

import pytest

from prefalign_jax.config import defaults, parse_arg
from prefalign_jax.types import UserError

# parse_arg


FIELDS = dict(loss="dpo", steps=3, rate=1e-3, shuffle=True, path=None)


def test_an_empty_argument_gives_the_defaults():
    assert dict(parse_arg("", **FIELDS)) == FIELDS
    assert dict(parse_arg(None, **FIELDS)) == FIELDS


def test_values_take_the_type_of_their_default():
    found = parse_arg("loss=7,steps=8,rate=2,shuffle=False,path=/a/b:c=d", **FIELDS)
    assert dict(found) == dict(loss="7", steps=8, rate=2.0, shuffle=False, path="/a/b:c=d")
    assert {name: type(value) for name, value in found.items()} == dict(
        loss=str, steps=int, rate=float, shuffle=bool, path=str
    )


@pytest.mark.parametrize("text", ["ipo,steps=5", "loss=ipo,steps=5", "steps=5,ipo", ",ipo,,steps=5,"])
def test_a_bare_word_sets_the_first_field(text):
    assert dict(parse_arg(text, **FIELDS)) == {**FIELDS, "loss": "ipo", "steps": 5}


@pytest.mark.parametrize(
    "text", ["steps=5.5", "steps=five", "steps=", "rate=fast", "shuffle=maybe", "shuffle=2", "shuffle="]
)
def test_a_value_of_the_wrong_type_is_named(text):
    name, value = text.split("=")
    with pytest.raises(UserError) as caught:
        parse_arg(text, **FIELDS)
    assert all(part in str(caught.value) for part in (name, repr(value), type(FIELDS[name]).__name__))


def test_an_unknown_argument_names_the_nearest_and_all():
    with pytest.raises(UserError, match="'stpes'.*did you mean 'steps'") as caught:
        parse_arg("stpes=5", **FIELDS)
    assert all(name in str(caught.value) for name in FIELDS)


# defaults


def test_every_field_has_a_meaning_beside_or_above_it():
    lines = inspect.getsource(defaults).splitlines()
    fields = [n for n, line in enumerate(lines) if re.match(r"    c\.[\w.]+ = (?!ConfigDict\(\))", line)]
    assert len(fields) > 100
    for n in fields:
        again = lines[n + 1].partition(" = ")[0] == lines[n].partition(" = ")[0]  # its type, and then its value
        assert "  # " in lines[n] or lines[n - 1].lstrip().startswith("# ") or again, lines[n]


def test_the_defaults_are_locked_and_name_the_nearest_field():
    c = defaults()
    with pytest.raises(AttributeError, match="batch_size"):
        c.batchsize = 4
    with pytest.raises(AttributeError, match="weight_decay"):
        c.optimizer.weight_decai = 0.1
    with pytest.raises(TypeError):
        c.max_length = "long"


def test_two_experiments_share_nothing():
    one, other = defaults(), defaults()
    one.loss.beta = 0.5
    one.data.path = "here"
    assert other.loss.beta is None
    assert other.data.path is None
