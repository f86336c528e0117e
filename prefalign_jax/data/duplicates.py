"""Records that say what an earlier one says: letter by letter, almost, or the other way round."""

from __future__ import annotations

import collections
import functools
import hashlib
import json
from collections.abc import Iterable
from typing import Any

from prefalign_jax.data.records import Record
from prefalign_jax.data.words import parts, shingles

# Weights of false positives and false negatives in datasketch's choice of bands: what it finds in vain costs a
# comparison, what it misses stays in the data.
_WEIGHTS = (0.02, 0.98)
_MOST = 0.98  # there are no bands for a higher threshold


def exact_duplicates(records: Iterable[Record]) -> tuple[list[Record], dict[str, int]]:
    """Keeps the first of the records with the same prompt, tools, responses and label.

    Example:
      >>> exact_duplicates([Record("a", "b", "c"), Record("a", "c", "b"), Record("a", "b", "c", weight=2.0)])[1]
      {'exact duplicate': 1}
    """
    seen, kept, dropped = set(), [], 0
    for record in records:
        texts = [record.prompt, record.chosen, record.rejected, *record.others]
        key = _digest([*texts, record.label, record.tools, record.chat_template_kwargs])
        if key in seen:
            dropped += 1
        else:
            seen.add(key)
            kept.append(record)
    return kept, {"exact duplicate": dropped}


def contradictions(records: Iterable[Record]) -> tuple[list[Record], dict[str, int]]:
    """Drops all pairs of a prompt and two responses that are each preferred once, and completions labelled both ways.

    Of groups those go that have the same responses in another order.

    Who is right is not known, so none stays. Texts are compared letter by letter. Both orders from one and the same row
    are a soft preference, which stays and contradicts nothing.

    Example:
      >>> contradictions([Record("a", "b", "c"), Record("a", "b", "d"), Record("a", "c", "b")])
      ([Record(prompt='a', chosen='b', rejected='d', ...)], {'contradictory': 2})
    """
    rows, keys, said = [], [], collections.defaultdict(set)
    for record in records:
        sides = [json.dumps(side, sort_keys=True) for side in (record.chosen, record.rejected, *record.others)]
        key = _digest([record.prompt, sorted(sides)])
        where = record.where if record.where.row else len(rows)  # what comes from nowhere shares its row with none
        rows.append(record)
        keys.append((key, where))
        said[key, where].add((tuple(sorted(range(len(sides)), key=sides.__getitem__)), record.label))
    hard = collections.defaultdict(set)
    for (key, _), directions in said.items():
        if len(directions) == 1:
            hard[key] |= directions
    kept = [
        record
        for record, (key, where) in zip(rows, keys, strict=True)
        if len(said[key, where]) > 1 or len(hard[key]) == 1
    ]
    return kept, {"contradictory": len(rows) - len(kept)}


def near_duplicates(
    records: Iterable[Record], *, threshold: float = 0.8, words: int = 3, permutations: int = 128, seed: int = 0
) -> tuple[list[Record], dict[str, int]]:
    """Keeps the first of the records that are alike, directly or through others.

    Two are alike if their labels are the same and prompts, chosen and rejected responses each have a Jaccard similarity
    |A and B| / |A or B| >= threshold of their sets of shingles. Prompts that are alike are not enough: another pair of
    answers to the same question says something new. Candidates are found by MinHash and compared exactly, so whatever
    is dropped is alike; of those just above the threshold a few in a hundred are missed. Which groups there are does
    not depend on the order of the records.

    Args:
      records: of which the first of each group stays.
      threshold: in (0, 1]; 1 asks for equal sets.
      words: in a shingle.
      permutations: of MinHash; more miss less.
      seed: of the permutations.

    Source: Broder (1997), On the resemblance and containment of documents; Leskovec, Rajaraman and Ullman (2014),
    Mining of massive datasets, section 3.4 (bands).

    Example:
      >>> long = "one two three four five six seven eight nine ten"
      >>> near_duplicates([Record(long, "yes", "no"), Record(long + "!", "Yes.", "no"), Record(long, "no", "yes")])[1]
      {'near duplicate': 1}
    """
    from datasketch import MinHash, MinHashLSH

    blank = MinHash(num_perm=permutations, seed=seed)
    index = MinHashLSH(num_perm=permutations, params=_bands(threshold, permutations))
    rows, parent, twins = [], [], {}

    @functools.lru_cache(maxsize=4096)
    def sets_of(number: int) -> tuple[frozenset[str], ...]:
        return tuple(shingles(text, words) for text in parts(rows[number]))

    def group(number: int) -> int:
        while parent[number] != number:
            parent[number] = number = parent[parent[number]]
        return number

    for number, record in enumerate(records):
        rows.append(record)
        parent.append(number)
        signature = blank.copy()
        # If every part is alike, so are these unions: (sum of intersections) >= threshold (sum of unions).
        tagged = [f"{i} {record.label} {s}".encode() for i, part in enumerate(sets_of(number)) for s in part]
        signature.update_batch(tagged)
        twin = twins.setdefault(hashlib.blake2b(signature.digest().tobytes(), digest_size=16).digest(), number)
        if twin != number and rows[twin].label == record.label and sets_of(twin) == sets_of(number):
            parent[number] = twin  # whatever is alike to this one is alike to that one, which the index has
            continue
        for other in sorted(index.query(signature)):
            if group(other) == group(number) or rows[other].label != record.label:
                continue
            ours, theirs = sets_of(number), sets_of(other)
            if len(ours) == len(theirs) and all(jaccard(*both) >= threshold for both in zip(ours, theirs, strict=True)):
                first, second = sorted((group(other), group(number)))
                parent[second] = first
        index.insert(number, signature)
    kept = [record for number, record in enumerate(rows) if parent[number] == number]
    return kept, {"near duplicate": len(rows) - len(kept)}


@functools.cache
def _bands(threshold: float, permutations: int) -> tuple[int, int]:
    """datasketch's choice of (bands, rows of each), which it takes a while over."""
    from datasketch import MinHashLSH

    index = MinHashLSH(threshold=min(threshold, _MOST), num_perm=permutations, weights=_WEIGHTS)
    return index.b, index.r


def jaccard(a: frozenset, b: frozenset) -> float:
    """|a and b| / |a or b|; 1 if both are empty.

    Example:
      >>> jaccard(frozenset("ab"), frozenset("bc"))
      0.3333333333333333
    """
    both = len(a & b)
    return both / (len(a) + len(b) - both) if a or b else 1.0


def _digest(what: Any) -> bytes:
    """16 bytes in place of texts, of which there may be millions."""
    return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).digest()
