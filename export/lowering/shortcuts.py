"""shortcuts: spares lowering what torch and ExecuTorch work out again and again, or in vain; files stay the same."""

import typing
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._export import utils
from torch.export import decomp_utils, exported_program


@contextmanager
def known_operators() -> Iterator[None]:
    """Goes through torch's operators once where every decomposition does so once for each of their 40 namespaces.

    Beside that, a decomposition writes 10,000 annotations, of which `typing` keeps the value and `collections.abc` does
    not.
    """
    materialize, collect = utils._materialize_cpp_cia_ops, utils._collect_all_valid_cia_ops

    def collect_at_once() -> set[Any]:
        materialize()
        with _replaced(utils, "_materialize_cpp_cia_ops", lambda: None):
            return collect()

    with ExitStack() as stack:
        for module in (decomp_utils, exported_program):
            stack.enter_context(_replaced(module, "_collect_all_valid_cia_ops", collect_at_once))
        stack.enter_context(_replaced(torch._ops, "Callable", typing.Callable))
        yield


@contextmanager
def no_patterns() -> Iterator[None]:
    """Spares XNNPACK the tracing of two patterns that no block has.

    A Llama enlarges no picture, and its attention has scores of the cache and of new tokens side by side, which is
    another pattern than `scaled_dot_product_attention`.
    """
    from executorch.backends.xnnpack.partition.graphs import bilinear_2d, sdpa

    with _replaced(bilinear_2d, "get_graphs_dict", dict), _replaced(sdpa, "get_graphs", list):
        yield


@contextmanager
def _replaced(module: object, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
