"""Finds every number of a program and of its XNNPACK graphs, by ExecuTorch's own schemas, so that tests can change
them.
"""

import re
import struct
from collections import defaultdict
from collections.abc import Iterable
from importlib.resources import files
from random import Random
from typing import NamedTuple

_PROGRAM = ("schema/scalar_type.fbs", "schema/program.fbs")
_GRAPH = ("backends/xnnpack/serialization/runtime_schema.fbs",)
_FORMATS = {
    "bool": "B", "byte": "b", "ubyte": "B", "short": "h", "ushort": "H", "int": "i", "uint": "I", "uint32": "I",
    "float": "f", "long": "q", "int64": "q", "uint64": "Q", "double": "d",
}  # fmt: skip


class Number(NamedTuple):
    """A number in a file: its place, and its format as of `struct`."""

    place: int
    format: str


class Schema:
    """The tables, enums and unions of a flatbuffer's schema."""

    def __init__(self, names: Iterable[str]) -> None:
        text = "\n".join(files("executorch").joinpath(name).read_text() for name in names)
        text = re.sub(r"//[^\n]*", "", text)
        self.enums = dict(re.findall(r"enum (\w+)\s*:\s*(\w+)", text))
        self.unions = {
            name: [member.split(":")[-1].strip() for member in body.split(",") if member.strip()]
            for name, body in re.findall(r"union (\w+)\s*\{([^}]*)\}", text)
        }
        self.tables = dict[str, list[tuple[str, str]]]()
        for name, body in re.findall(r"table (\w+)\s*\{([^}]*)\}", text):
            fields = self.tables[name] = []
            for field, kind in re.findall(r"(\w+)\s*:\s*(\[?\w+\]?)[^;]*;", body):
                fields += [(f"{field}_type", "ubyte")] * (kind in self.unions) + [(field, kind)]

    def format(self, kind: str) -> str | None:
        """Returns the format of a number; None if the kind is no number."""
        return _FORMATS.get(self.enums.get(kind, kind))


def numbers(program: bytes) -> dict[str, list[Number]]:
    """Returns the numbers of each field: sizes, indices, lengths, offsets of fields and elements, and letters."""
    found = defaultdict[str, list[Number]](list)
    _Walk(program, Schema(_PROGRAM), found).table(_at(program, 0), "Program")
    for match in re.finditer(rb"XH00", program):
        start = match.start() - 4
        for i in range(4):
            found["header"].append(Number(start + 10 + 4 * i, "I"))
        start = _at(program, start + 10, start)
        _Walk(program, Schema(_GRAPH), found).table(_at(program, start), "XNNGraph")
    return {field: places for field, places in found.items() if places}


def changed(program: bytes, places: dict[str, list[Number]], random: Random) -> bytes:
    """Returns the program with one to three numbers changed, to those that programs trip over."""
    data = bytearray(program)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        field = places[random.choice(sorted(places))]
        place, form = random.choice(field)
        (old,) = struct.unpack_from(f"<{form}", data, place)
        if form in "fd":
            struct.pack_into(f"<{form}", data, place, random.choice((0.0, -1.0, float("nan"), float("inf"), 1e30)))
            continue
        (other,) = struct.unpack_from(f"<{form}", data, random.choice(field).place)
        near = (old + 1, old - 1, old + 8, old - 8, 2 * old, old // 2, old ^ 1 << random.randrange(8))
        new = random.choice((0, 1, 2, 3, -1, -2, 1 << 31, 1 << 62, 100_000, random.randrange(300), other, other, *near))
        size = struct.calcsize(form)
        data[place : place + size] = (new % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(data)


def _at(data: bytes, place: int, start: int | None = None) -> int:
    """Returns where an offset leads."""
    (offset,) = struct.unpack_from("<I", data, place)
    return int(offset) + (place if start is None else start)


class _Walk:
    def __init__(self, data: bytes, schema: Schema, found: dict[str, list[Number]]) -> None:
        self.data, self.schema, self.found = data, schema, found
        self.seen = set[tuple[int, str]]()

    def table(self, place: int, name: str) -> None:
        """Adds the numbers of a table and of all below it."""
        if (place, name) in self.seen:
            return
        self.seen.add((place, name))
        fields = place - struct.unpack_from("<i", self.data, place)[0]
        (size,) = struct.unpack_from("<H", self.data, fields)
        member = 0
        for i, (field, kind) in enumerate(self.schema.tables[name][: (size - 4) // 2]):
            label, entry = f"{name}.{field}", fields + 4 + 2 * i
            self.found[f"{label} offset"].append(Number(entry, "H"))
            (offset,) = struct.unpack_from("<H", self.data, entry)
            if offset == 0:
                continue
            if form := self.schema.format(kind):
                self.found[label].append(Number(place + offset, form))
                member = self.data[place + offset]
            elif kind in self.schema.unions:
                self.table(_at(self.data, place + offset), self.schema.unions[kind][member - 1])
            elif kind in self.schema.tables:
                self.table(_at(self.data, place + offset), kind)
            else:
                self.vector(_at(self.data, place + offset), kind.strip("[]"), label)

    def vector(self, place: int, kind: str, label: str) -> None:
        """Adds the numbers of a vector or text; of a long one, only the first."""
        self.found[f"{label} length"].append(Number(place, "I"))
        (length,) = struct.unpack_from("<I", self.data, place)
        if form := "B" if kind == "string" else self.schema.format(kind):
            width = struct.calcsize(form)
            self.found[f"{label} items"] += [Number(place + 4 + width * i, form) for i in range(min(length, 100))]
            return
        for i in range(length):
            item = place + 4 + 4 * i
            self.found[f"{label} items"].append(Number(item, "I"))
            self.table(_at(self.data, item), kind)
