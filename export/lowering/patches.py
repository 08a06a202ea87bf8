"""Patches of torch and ExecuTorch that avoid repeated or unneeded work in lowering, without changing the result."""

import typing
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._export import utils
from torch.export import decomp_utils, exported_program


@contextmanager
def known_operators() -> Iterator[None]:
    """Lists torch's operators once per decomposition, instead of once for each of their 40 namespaces.

    It also replaces collections.abc.Callable by typing.Callable in torch._ops: a decomposition evaluates 10,000
    annotations, and only `typing` caches them.
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
    """Skips the tracing of two XNNPACK patterns that do not occur in any block.

    A Llama model does not resize images. Its attention concatenates the scores of the cache and of the new tokens,
    which does not match `scaled_dot_product_attention`.
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
