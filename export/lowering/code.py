"""Code, the result of lowering a piece of a model once: calls of a backend and of operators, with weights by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from executorch.exir.backend.compile_spec_schema import CompileSpec
from torch import Tensor, nn
from torch.export import ExportedProgram

from export.lowering.trace import dynamic_shapes
from runtime.pte.metadata import MethodSpec, TensorSpec


@dataclass(frozen=True)
class Part:
    """A part of a parameter in a backend's code.

    Attributes:
        key: name in the code: a prefix, and 64 hexadecimal digits.
        parameter: name of the parameter within the piece.
        number: index in the list returned by `Format.parts`.
        nbytes: size of the data, in bytes.
    """

    key: str
    parameter: str
    number: int
    nbytes: int


@dataclass(frozen=True)
class Delegate:
    """Operations of a piece that a backend runs, lowered with random weights.

    Attributes:
        backend_id, payload, compile_specs: the backend's code, in which data is named by its SHA-256.
        data: the parameter parts to which the code refers by name.
        stand_in: graph with the arguments and results of the code, used where only their shapes matter.
    """

    backend_id: str
    payload: bytes
    compile_specs: list[CompileSpec]
    data: tuple[Part, ...]
    stand_in: ExportedProgram


class Value(NamedTuple):
    """An argument of a call, or a result of a piece.

    Attributes:
        kind: what `value` is: "input": the number of an argument of the piece; "result": the number of an earlier call,
            and the index in its results, or None if it has one; "parameter": the name of a parameter of the piece;
            "constant": a tensor or a plain value; "list": several of these.
        value: see `kind`.
    """

    kind: str
    value: Any

    @staticmethod
    def of(found: Sequence[Any]) -> "Value":
        """Returns the value from a pair that the export cache keeps."""
        kind, value = found
        return Value(kind, tuple(Value.of(each) for each in value) if kind == "list" else value)


@dataclass(frozen=True)
class Call:
    """A step of a lowered piece.

    Attributes:
        target: a delegate, or the name of an operator, such as llama_pte.linear.default.
        arguments: arguments of the call.
    """

    target: Delegate | str
    arguments: tuple[Value, ...]


@dataclass(frozen=True)
class Code:
    """A lowered piece, for one method.

    Attributes:
        calls: the steps, in the order in which they run.
        results: results of the piece.
    """

    calls: tuple[Call, ...]
    results: tuple[Value, ...]

    @property
    def delegates(self) -> list[Delegate]:
        """The steps that a backend runs."""
        return [call.target for call in self.calls if isinstance(call.target, Delegate)]


def decoded(entry: Mapping[str, Any], spec: MethodSpec) -> Code:
    """Returns the code from the plain values and tensors in which the export cache keeps it."""
    calls = []
    for call in entry["calls"]:
        target = call["operator"] if "operator" in call else _delegate(call, spec)
        calls.append(Call(target, tuple(Value.of(each) for each in call["arguments"])))
    return Code(tuple(calls), tuple(Value.of(each) for each in entry["results"]))


def _delegate(call: Mapping[str, Any], spec: MethodSpec) -> Delegate:
    return Delegate(
        backend_id=call["backend_id"],
        payload=call["payload"].numpy().tobytes(),
        compile_specs=[CompileSpec(key, bytes.fromhex(value)) for key, value in call["compile_specs"]],
        data=tuple(Part(*fields) for fields in call["data"]),
        stand_in=_stand_in(call["takes"], call["gives"], spec),
    )


class _Shapes(nn.Module):
    """A module that returns empty tensors of the given specs, with sizes taken from the arguments."""

    def __init__(self, arguments: list[TensorSpec], results: list[TensorSpec]) -> None:
        super().__init__()
        self.results = results
        self.length, self.rows = (
            next(((i, each.shape.index(symbol)) for i, each in enumerate(arguments) if symbol in each.shape), None)
            for symbol in ("L", "R")
        )

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        length, rows = (arguments[at[0]].shape[at[1]] if at else 1 for at in (self.length, self.rows))
        return tuple(arguments[0].new_empty(result.sizes(length, rows)) for result in self.results)


def _stand_in(takes: Sequence[Any], gives: Sequence[Any], spec: MethodSpec) -> ExportedProgram:
    arguments, results = ([TensorSpec("", tuple(size), dtype) for size, dtype in found] for found in (takes, gives))
    return torch.export.export(
        _Shapes(arguments, results),
        tuple(argument.zeros(spec.max_length, spec.max_rows) for argument in arguments),
        dynamic_shapes=dynamic_shapes("arguments", arguments, spec),
    )
