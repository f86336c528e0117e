"""What a compiled program sends between devices, read from its text: which collectives, how large, how often."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{\s*$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_CALLED = re.compile(r"(?:body|to_apply|called_computations|branch_computations|calls)=\{?([^,}]+(?:, ?%[\w.-]+)*)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: one of COLLECTIVES.
      shapes: of its results on a device.
      size: bytes of the results on a device.
      group: the devices of the first of the groups that exchange something.
      times: how often a run of the program does it, loops counted; None in a loop of unknown length.
      in_loop: whether it is in a loop.
      where: the operation of the traced function that it came from.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    size: int
    group: tuple[int, ...]
    times: int | None
    in_loop: bool
    where: str

    @property
    def sent(self) -> float:
        """Bytes that a device sends each time, in a ring: the least that any algorithm takes.

        Example:
          >>> Collective("all-reduce", ((8,),), 32, (0, 1, 2, 3), 1, False, "").sent  # 2 (n - 1) / n of it
          48.0
        """
        n = len(self.group)
        share = (n - 1) / n
        factor = {"all-reduce": 2 * share, "reduce-scatter": n - 1, "collective-permute": 1}.get(self.kind, share)
        return factor * self.size


def collectives(text: str, devices: int) -> list[Collective]:
    """The collectives of a compiled program.

    Args:
      text: `compiled.as_text()`.
      devices: that the program runs on.

    Returns:
      Those between two devices or more, in the order of the text.
    """
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            bodies[name].append(line)
    times, looped = _times(bodies, entry)
    counted = []
    for name, lines in bodies.items():
        for line in lines:
            if not (match := _COLLECTIVE.search(line)) or name not in times:
                continue
            kind = match[2]
            shapes = [
                (dtype, tuple(map(int, filter(None, dims.split(",")))))
                for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", re.sub(r"\{[^}]*\}", "", match[1]))
            ]
            if match[3] and kind in ("all-gather", "collective-permute"):  # (operands, results, ...)
                shapes = shapes[len(shapes) // 2 :] if kind == "all-gather" else shapes[1:2]
            group = _group(line, devices)
            if len(group) < 2:
                continue
            size = sum(_bits(dtype) * math.prod(dims) // 8 for dtype, dims in shapes)
            where = re.search(r'op_name="([^"]*)"', line)
            dims = tuple(dims for _, dims in shapes)
            counted.append(Collective(kind, dims, size, group, times[name], looped[name], where[1] if where else ""))
    return counted


def _bits(dtype: str) -> int:
    """f32 -> 32, bf16 -> 16, pred -> 8."""
    return int(match[0]) if (match := re.search(r"\d+", dtype)) else 8


def _times(bodies: dict[str, list[str]], entry: str) -> tuple[dict[str, int | None], dict[str, bool]]:
    """How often each computation runs, and whether in a loop."""
    times: dict[str, int | None] = defaultdict(int)
    looped: dict[str, bool] = defaultdict(bool)

    def visit(name: str, count: int | None, in_loop: bool) -> None:
        known = times[name]
        times[name] = None if count is None or known is None else known + count
        looped[name] |= in_loop
        for line in bodies.get(name, ()):
            loop = " while(" in line
            trips = _TRIPS.search(line)
            each = 1 if not loop else int(trips[1]) if trips else None
            for called in _CALLED.findall(line):
                for one in called.replace("%", "").split(","):
                    if one.strip() in bodies:
                        inner = None if count is None or each is None else count * each
                        visit(one.strip(), inner, in_loop or loop)

    visit(entry, 1, False)
    return times, looped


def _group(line: str, devices: int) -> tuple[int, ...]:
    """The first group of devices of a collective, by numbers."""
    if "source_target_pairs=" in line:
        pairs = re.findall(r"\{(\d+),(\d+)\}", line.partition("source_target_pairs=")[2])
        return next((pair for pair in (tuple(map(int, pair)) for pair in pairs) if pair[0] != pair[1]), ())
    groups = line.partition("replica_groups=")[2]
    if match := re.match(r"\{\{([\d,]*)\}", groups):
        return tuple(map(int, match[1].split(",")))
    if match := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", groups):
        shape, reshaped = ([int(x) for x in match[i].split(",")] for i in (1, 2))
        numbers = np.arange(math.prod(reshaped)).reshape(reshaped)
        if match[3]:
            numbers = numbers.transpose([int(x) for x in match[3].split(",")])
        return tuple(numbers.reshape(shape)[0].tolist())
    if match := re.match(
        r"mesh\[([^\]]*)\](?:, ?device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?|[\d,]+)\))? ?\{([^}]*)\}", groups
    ):
        return _of_mesh(*match.groups())
    return tuple(range(devices))


def _of_mesh(axes: str, order: str | None, along: str) -> tuple[int, ...]:
    """The first group of mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a'}: the devices along those axes."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
    numbers = np.arange(math.prod(sizes.values()))
    if match := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order or ""):
        numbers = numbers.reshape([int(x) for x in match[1].split(",")])
        numbers = numbers.transpose([int(x) for x in match[2].split(",")]) if match[2] else numbers
    elif order:
        numbers = np.array([int(x) for x in order.split(",")])
    numbers = numbers.reshape(list(sizes.values()))
    wanted = re.findall(r"'([^']*)'", along)
    return tuple(numbers[tuple(slice(None) if name in wanted else 0 for name in sizes)].reshape(-1).tolist())
