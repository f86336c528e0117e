"""A prompt with K responses, and what says which is better: scores, ranks, or comparisons of two of them.

{'prompt': ..., 'responses': [...], 'scores': [4, 2, 1]}                          more is better
{'prompt': ..., 'responses': [...], 'ranks': [1, 2, 2]}                           1 is best; equal ranks are a tie
{'prompt': ..., 'responses': [...], 'comparisons': [[0, 1], {'chosen': 0, 'rejected': 2, 'weight': 2, 'margin': 1}]}

The numbers of a comparison are places in `responses`, counted from 0. Every list may be its JSON. Comparisons beside
scores or ranks are the pairs, and the scores are the order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from prefalign_jax.data.fields import BESIDE
from prefalign_jax.data.pairing import choose_pairs, draw_some
from prefalign_jax.data.values import (
    Dropped,
    Malformed,
    empty,
    expected,
    missing,
    name_of,
    number,
    parsed,
    texts,
)

Row = Mapping[str, Any]

BEST_WORST = "best_worst"
RANKINGS = ("scores", "ranks", "comparisons")
GROUP_FIELDS = ("responses", *RANKINGS)
_SIDES = ("chosen", "rejected")
_COMPARISON = (*_SIDES, "weight", "margin")
_ANSWERS = (*_SIDES, "completion", "response", "messages", "text")  # a row with one of them is no group
_SAME = 9  # decimals of scores that were computed: what differs by less is a tie


class Comparison(NamedTuple):
    """One response is better than another one.

    Attributes:
      chosen, rejected: their places.
      weight: how much it counts.
      margin: by how much the chosen one is better, None where nobody says.
    """

    chosen: int
    rejected: int
    weight: float = 1.0
    margin: float | None = None


class Group(NamedTuple):
    """What a row says of its responses.

    Attributes:
      responses: as the row has them.
      scores: of each, more is better; None where there are only comparisons.
      comparisons: None where there are only scores.
      unread: what comparisons say beside what is read of them, by the names under which it is reported.
    """

    responses: list[Any]
    scores: list[float] | None
    comparisons: list[Comparison] | None
    unread: tuple[str, ...] = ()


def is_group(row: Row) -> bool:
    """Whether a row of the common format has several responses in place of one or two."""
    return not missing(row.get("responses")) and all(missing(row.get(name)) for name in _ANSWERS)


def read_group(row: Row) -> Group:
    """The responses of a row, checked.

    Raises:
      Malformed: there is nothing to tell which is better, or it does not fit the responses.
      Dropped: there are fewer than two responses.
    """
    responses = read_list(row["responses"], "responses")
    given = [name for name in RANKINGS if not missing(row.get(name)) and row[name] != ""]
    if len(responses) < 2:
        raise Dropped("fewer than two answers")
    for i, response in enumerate(responses):
        if missing(response):
            raise expected("a text or messages", response, f"responses[{i}]")
    if not given:
        raise Malformed(
            f"field 'responses': expected one of the fields {', '.join(RANKINGS)} beside it; if another holds them, "
            "write --config.data.columns=scores=FIELD"
        )
    if not empty(row.get("margin")):
        raise Malformed("field 'margin': the scores of responses say it; write data.ignore=margin to leave it out")
    if given[:2] == ["scores", "ranks"]:
        raise Malformed("fields 'scores' and 'ranks': expected one of them; write data.ignore=ranks to leave it out")
    scores, comparisons, unread = None, None, ()
    if given[0] != "comparisons":
        values = read_list(row[given[0]], given[0])
        if len(values) != len(responses):
            what = f"field {given[0]!r}: expected {len(responses)} numbers, one for each response"
            raise Malformed(f"{what}, found {len(values)}")
        what, above = ("a finite number", -np.inf) if given[0] == "scores" else ("a rank, 1 for the best", 0.0)
        scores = [number(value, f"{given[0]}[{i}]", what, above) for i, value in enumerate(values)]
        scores = [-rank for rank in scores] if given[0] == "ranks" else scores
    if given[-1] == "comparisons":
        listed = read_list(row["comparisons"], "comparisons")
        comparisons = [_comparison(one, f"comparisons[{i}]", len(responses)) for i, one in enumerate(listed)]
        if not comparisons:
            raise Dropped("no comparison")
        objects = [one for one in listed if isinstance(one, Mapping)]
        names = {name for one in objects for name, value in one.items() if name not in _COMPARISON and not empty(value)}
        unread = tuple(f"comparisons[].{name_of(name)}" for name in sorted(names, key=str))
    return Group(responses, scores, comparisons, unread)


def read_list(value: Any, field: str) -> list:
    """The value, which must be a list or its JSON."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        value = parsed(value, field)
    if not isinstance(value, list):
        raise expected("a list", value, field)
    return value


def _comparison(value: Any, field: str, responses: int) -> Comparison:
    """One comparison: [better, worse], or an object."""
    if isinstance(value, Mapping):
        weight, margin = (value.get(name) for name in _COMPARISON[2:])
        places = [value.get(name) for name in _SIDES]
    else:
        weight, margin, places = None, None, value
    if not isinstance(places, list) or len(places) != 2 or any(missing(place) for place in places):
        raise expected("[better, worse], or an object with 'chosen' and 'rejected'", value, field)
    known = range(responses)
    for place in places:
        if not isinstance(place, int | float) or isinstance(place, bool) or place not in known:
            raise expected(f"the places of two responses, 0 to {responses - 1}", value, field)
    better, worse = map(int, places)
    if better == worse:
        raise expected("two different responses", value, field)
    weight = 1.0 if missing(weight) else number(weight, f"{field}.weight", "a positive finite number", 0.0)
    return Comparison(better, worse, weight, None if missing(margin) else number(margin, f"{field}.margin"))


def pairs_of(
    row: Row,
    how: str = BEST_WORST,
    draw: Callable[[Any], float] = lambda texts: 0.0,
    *,
    named: str = "",
    margins: bool = True,
    ordered: bool = False,
) -> tuple[list[Row], int]:
    """The pairs of a group, as rows of the common format.

    Args:
      row: with `responses`.
      how: which pairs, see `pairing.choose_pairs`. Comparisons are taken as they are listed, of 'random:N' N of them.
      draw: the texts of a prompt and of two responses -> a number in [0, 1).
      named: what the data set calls the responses, to report those that are neither best nor worst.
      ordered: whether an order of all responses is wanted, whatever the comparisons are.
      margins: whether anybody reads margins; if not, the first pair alone has one, so that it is reported once.

    Returns:
      (rows with prompt, chosen, rejected and a margin; how many pairs are left out as ties). What else the row says is
      in the first of them, and in the others only what decides how a pair is read.

    Raises:
      Malformed: as in `read_group`, or there is no order to choose by.
      Dropped: there are fewer than two responses, or no comparison.
    """
    group = read_group(row)
    if ordered:
        group = group._replace(scores=scores_of(group), comparisons=None)
    asked = list(texts(row.get("prompt")))

    def drawn(pair: Sequence[Any]) -> float:
        return draw([asked, *(list(texts(group.responses[place])) for place in pair[:2])])

    ties = 0
    if group.comparisons is None:
        chosen, ties = choose_pairs(group.scores, how, drawn)
        pairs = [Comparison(*pair) for pair in chosen]
    elif how == "adjacent":
        raise Malformed(
            "field 'comparisons': data.pairs=adjacent takes neighbours in an order of scores or ranks; "
            "write data.pairs=all for the comparisons as they are listed"
        )
    else:
        pairs = draw_some(group.comparisons, how, drawn)
    rest = {name: value for name, value in row.items() if name not in GROUP_FIELDS}
    later = {name: value for name, value in rest.items() if name in BESIDE}
    first = {**rest, **dict.fromkeys(group.unread, True)}
    if named and how == BEST_WORST and group.comparisons is None and len(group.responses) > 2:
        first[f"{named}[] between best and worst"] = True
    rows = [_pair(later if number else first, group, pair) for number, pair in enumerate(pairs)]
    if not margins:
        rows[1:] = [{name: value for name, value in one.items() if name != "margin"} for one in rows[1:]]
    return rows, ties


def _pair(rest: Row, group: Group, pair: Comparison) -> Row:
    """A row of the common format."""
    out = {**rest, **{side: group.responses[place] for side, place in zip(_SIDES, pair[:2], strict=True)}}
    if pair.margin is not None:
        out["margin"] = pair.margin
    elif group.scores is not None:
        out["margin"] = group.scores[pair.chosen] - group.scores[pair.rejected]
    if pair.weight != 1:
        out["weight"] = pair.weight * (1.0 if missing(rest.get("weight")) else number(rest["weight"], "weight"))
    return out


# An order of all responses.


def scores_of(group: Group) -> list[float]:
    """A score for each response, more is better.

    Comparisons that all have a margin give the scores s that fit them best, the least sum of
    weight * (s_chosen - s_rejected - margin)^2, the lowest 0. Others must order all responses, ties allowed; then the
    scores are ranks with a minus sign.

    Raises:
      Malformed: the comparisons do not order the responses.

    Source: least squares on comparisons as in Jiang et al., arXiv 0811.1067 (HodgeRank).

    Example:
      >>> scores_of(Group(["a", "b", "c"], None, [Comparison(1, 0), Comparison(0, 2)]))
      [-2.0, -1.0, -3.0]
      >>> scores_of(Group(["a", "b", "c"], None, [Comparison(1, 0, margin=0.5), Comparison(0, 2, margin=2.0)]))
      [2.0, 2.5, 0.0]
    """
    if group.scores is not None:
        return group.scores
    better = np.zeros((len(group.responses),) * 2, bool)
    for one in group.comparisons:
        better[one.chosen, one.rejected] = True
    if all(one.margin is not None for one in group.comparisons):
        joined = _closed(better | better.T | np.eye(len(better), dtype=bool))
        if not joined.all():
            raise _unordered(*np.argwhere(~joined)[0])
        return _fitted(group.comparisons, len(better))
    better = _closed(better)
    if better.diagonal().any():
        place = int(better.diagonal().argmax())
        raise Malformed(f"field 'comparisons': expected an order, and responses[{place}] is better than itself by them")
    above = better.sum(axis=0)
    expected_order = above[:, None] < above[None, :]
    if (better != expected_order).any():
        raise _unordered(*np.argwhere(better != expected_order)[0])
    return [-1.0 - float(count) for count in above]


def _closed(relation: np.ndarray) -> np.ndarray:
    """The transitive closure of a [K, K] bool relation."""
    for _ in range(len(relation).bit_length()):
        relation = relation | (relation.astype(np.int64) @ relation.astype(np.int64) > 0)
    return relation


def _unordered(first: int, second: int) -> Malformed:
    one, other = (f"responses[{place}]" for place in sorted((int(first), int(second))))
    return Malformed(
        f"field 'comparisons': expected an order of all responses, and none says how {one} and {other} compare"
    )


def _fitted(comparisons: Sequence[Comparison], responses: int) -> list[float]:
    """The scores whose differences fit the margins best."""
    design = np.zeros((len(comparisons), responses))
    rows, root = np.arange(len(comparisons)), np.sqrt([one.weight for one in comparisons])
    design[rows, [one.chosen for one in comparisons]] = root
    design[rows, [one.rejected for one in comparisons]] = -root
    scores = np.linalg.lstsq(design, root * [one.margin for one in comparisons], rcond=None)[0]
    return np.round(scores - scores.min(), _SAME).tolist()


class _Joined(NamedTuple):
    """Responses that pairs join, directly or through others."""

    places: dict[str, int]  # text -> place
    responses: list[Any]
    comparisons: list[Comparison]

    def place(self, response: Any) -> int:
        """The place of a response, a new one where it is unknown."""
        place = self.places.setdefault(_key(response), len(self.responses))
        if place == len(self.responses):
            self.responses.append(response)
        return place

    def add(self, other: _Joined) -> None:
        """Takes in another one, which has no response in common."""
        to = [self.place(response) for response in other.responses]
        moved = (one._replace(chosen=to[one.chosen], rejected=to[one.rejected]) for one in other.comparisons)
        self.comparisons.extend(moved)


def _key(response: Any) -> str:
    return json.dumps(response, sort_keys=True)


def gathered(rows: Iterable[Sequence[Row]], by: Sequence[str]) -> tuple[list[Row], int]:
    """Pairs of one prompt as groups with comparisons: each text once; responses that no chain of pairs joins are apart.

    Args:
      rows: of each row of a data set its pairs in the common format; the weights of these are parts of the row's.
      by: the fields that are the same in all of them, for messages.

    Returns:
      (the groups, in the order of their first responses; how many pairs are of identical responses, and left out).

    Raises:
      Malformed: the rows differ in something that a group says once.
    """
    groups: list[_Joined] = []
    whole: dict[str, Any] = {}
    identical = 0
    for pairs in rows:
        weights = [1.0 if missing(pair.get("weight")) else number(pair["weight"], "weight") for pair in pairs]
        rest = {name: value for name, value in pairs[0].items() if name not in (*_SIDES, "margin")}
        rest["weight"] = float(f"{sum(weights):.9g}")
        whole = whole or rest
        check_alike(whole, rest, by)
        for pair, weight in zip(pairs, weights, strict=True):
            keys = {_key(pair[side]) for side in _SIDES}
            if len(keys) < 2:
                identical += 1
                continue
            touched = [group for group in groups if not keys.isdisjoint(group.places)]
            if not touched:
                touched = [_Joined({}, [], [])]
                groups += touched
            for other in touched[1:]:
                touched[0].add(other)
                groups.remove(other)
            places = [touched[0].place(pair[side]) for side in _SIDES]
            touched[0].comparisons.append(Comparison(*places, weight / rest["weight"], pair.get("margin")))
    return [
        {**whole, "responses": one.responses, "comparisons": [c._asdict() for c in one.comparisons]} for one in groups
    ], identical


def check_alike(row: Row, other: Row, by: Sequence[str]) -> None:
    """Refuses two rows of a group that differ in what the group says once."""
    for field in BESIDE:
        if field != "prompt" and other.get(field) != row.get(field):
            same = " and ".join(map(repr, by))
            raise Malformed(f"field {field!r}: rows with the same {same} are read together, and differ in it")
