"""The table of storage formats, by which a file's provenance is read."""

from collections.abc import Mapping
from typing import Any

from export.weights.formats.blocks import Blocks
from export.weights.formats.float32 import Float32
from export.weights.formats.format import Format
from export.weights.formats.integer import Integer

FORMATS: dict[str, type[Format]] = {form.kind: form for form in (Float32, Integer, Blocks)}


def parse(found: Mapping[str, Any]) -> Format:
    """Returns the format that `Format.to_json` describes. In files from before formats had names, float32 is the one
    without bits.
    """
    fields = dict(found)
    kind = fields.pop("kind", "integer" if fields["bits"] else "float32")
    return FORMATS[kind](**fields)
