"""Tests whether verification passes correct files and refuses wrong ones, with many files and many faults in each.

python -m tests.bench.gate --checkpoint build/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
python -m tests.bench.gate --only stories

Faults in weights and in the graph are planted in the model that a correct file is compared with, which is equivalent to
a wrong file of the correct model. Faults in positions and caches are planted in the runtime that runs the file.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from export.checkpoints.layouts import BUILT_IN
from export.llama import Progress, _write
from export.lowering.trace import GraphOptions
from export.planning.plan import ExportOptions, Plan, plan
from export.quality.fidelity import Observed, judge, observed
from export.quality.weight_bytes import altered
from export.weights.scheme import SCHEMES, Scheme
from export.weights.source import WeightSource
from model.model import Llama
from preproc.mask import CausalMask
from preproc.position_inputs import PositionInputs
from runtime.engine.kv_cache import KVCache
from runtime.engine.program import Program
from tests.conftest import DEEP, planned, random_model, write_pte

SMOLLM2 = (
    ("fp32", "fp32"),
    ("fp32", "fp16"),
    ("fp32", "int8"),
    ("8da8w", "fp32"),
    ("8da8w", "int8"),
    ("8da4w", "fp16"),
)
"""Combinations of --quantize and --kv-dtype for the large model's files."""

SMALL = (*SMOLLM2, ("8da8w", "fp16"), ("8da4w", "fp32"), ("8da4w", "int8"))
MOE = replace(DEEP, n_experts=4, n_chosen_experts=2)


@dataclass(frozen=True)
class Right:
    """A correct file: its name, its path, and the weights it was made from."""

    name: str
    path: Path
    source: WeightSource


class Changed(Mapping[str, Tensor]):
    """A model's weights with some of them replaced."""

    def __init__(self, weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
        self._weights, self._others = weights, others

    def __getitem__(self, name: str) -> Tensor:
        return self._others[name] if name in self._others else self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def others(source: WeightSource, found: Mapping[str, Tensor]) -> WeightSource:
    """Returns the source with some weights replaced."""
    return WeightSource(source.config, Changed(source._weights, found), source.scheme)


def _middle(source: WeightSource) -> str:
    return f"layers.{source.config.n_layers // 2}"


def _feed(source: WeightSource) -> str:
    return f"{_middle(source)}.feed_forward" + (".experts.0" if source.config.n_experts else "")


def _swapped(source: WeightSource, name: str) -> WeightSource:
    weight = source.weight(name).clone()
    weight[[0, 1]] = weight[[1, 0]]
    return others(source, {name: weight})


def swapped_rows(source: WeightSource) -> WeightSource:
    """Swaps two rows of a value matrix."""
    return _swapped(source, f"{_middle(source)}.attention.wv.weight")


def swapped_late_rows(source: WeightSource) -> WeightSource:
    """Swaps two rows in the last block's feed-forward, which affects no key or value."""
    return _swapped(source, f"layers.{source.config.n_layers - 1}.{_feed(source).split('.', 2)[2]}.w1.weight")


def doubled_scale(source: WeightSource) -> WeightSource:
    """Doubles the scale of one row in a feed-forward."""
    name = f"{_feed(source)}.w1.weight"
    weight = source.weight(name).clone()
    weight[7] *= 2
    return others(source, {name: weight})


def left_out_block(source: WeightSource) -> WeightSource:
    """Makes one block add nothing to the residual stream."""
    names = [f"{_middle(source)}.attention.wo.weight", f"{_feed(source)}.w2.weight"]
    return others(source, {name: torch.zeros_like(source.weight(name)) for name in names})


def swapped_blocks(source: WeightSource) -> WeightSource:
    """Swaps all weights of two adjacent blocks."""
    a, b = (f"layers.{source.config.n_layers // 2 + number}." for number in (0, 1))
    with torch.device("meta"):
        roles = [name.removeprefix(a) for name in Llama(source.config).state_dict() if name.startswith(a)]
    pairs = [(a, b), (b, a)]
    return others(source, {f"{to}{role}": source.weight(f"{origin}{role}") for to, origin in pairs for role in roles})


def swapped_k_and_v(source: WeightSource) -> WeightSource:
    """Swaps the key and value matrices of one block."""
    k, v = (f"{_middle(source)}.attention.{name}.weight" for name in ("wk", "wv"))
    return others(source, {k: source.weight(v), v: source.weight(k)})


def lost_norm(source: WeightSource) -> WeightSource:
    """Sets the weights of the final norm to 1."""
    return others(source, {"head.norm.weight": torch.ones_like(source.weight("head.norm.weight"))})


def lost_block_norm(source: WeightSource) -> WeightSource:
    """Sets the weights of one block's attention norm to 1."""
    name = f"{_middle(source)}.attention_norm.weight"
    return others(source, {name: torch.ones_like(source.weight(name))})


def wrong_epsilon(source: WeightSource) -> WeightSource:
    """Multiplies the norms' epsilon by ten."""
    config = replace(source.config, norm_eps=source.config.norm_eps * 10)
    return WeightSource(config, source._weights, source.scheme)


def wrong_theta(source: WeightSource) -> WeightSource:
    """Increases the rotary base by 1 %."""
    return WeightSource(
        replace(source.config, rope_theta=source.config.rope_theta * 1.01), source._weights, source.scheme
    )


def untied_head(source: WeightSource) -> WeightSource:
    """Unties the head and shifts its rows by one."""
    weight = source.weight("head.output.weight").roll(1, 0)
    config = replace(source.config, tied=False)
    return WeightSource(config, Changed(source._weights, {"head.output.weight": weight}), source.scheme)


def swapped_experts(source: WeightSource) -> WeightSource:
    """Swaps the first two experts of one block or, in a model without experts, a feed-forward's w1 and w3."""
    feed, kinds = f"{_middle(source)}.feed_forward.", ("w1", "w2", "w3")
    if not source.config.n_experts:
        w1, w3 = f"{feed}w1.weight", f"{feed}w3.weight"
        return others(source, {w1: source.weight(w3), w3: source.weight(w1)})
    names = [[f"{feed}experts.{number}.{kind}.weight" for kind in kinds] for number in (0, 1)]
    pairs = [*zip(names[0], names[1], strict=True), *zip(names[1], names[0], strict=True)]
    return others(source, {to: source.weight(origin) for to, origin in pairs})


PLANTED: tuple[Callable[[WeightSource], WeightSource], ...] = (
    swapped_rows,
    swapped_late_rows,
    doubled_scale,
    left_out_block,
    swapped_blocks,
    swapped_k_and_v,
    swapped_experts,
    lost_norm,
    lost_block_norm,
    wrong_epsilon,
    wrong_theta,
    untied_head,
)
"""Faults in the model that a file is compared with."""


@contextmanager
def rope_off_by_one() -> Iterator[None]:
    """Rotates every token as if it stood one position later."""
    move = PositionInputs.move

    def moved(self: PositionInputs, position: int, length: int) -> None:
        move(self, position, length)
        for name in ("cos", "sin"):
            if name in self.tensors:
                rows = self.tensors[name].numpy()[0]
                rows[:length] = self._tables[name][0].take(range(position + 1, position + 1 + length), 0, mode="clip")
        self._place = (-1, -1)

    with mock.patch.object(PositionInputs, "move", moved):
        yield


@contextmanager
def mask_off_by_one() -> Iterator[None]:
    """Hides the latest cached token from attention."""
    move, slide = PositionInputs.move, CausalMask.move

    def moved(self: PositionInputs, position: int, length: int) -> None:
        move(self, position, length)
        self._start[0] = max(position - 1, 0)
        self._place = (-1, -1)

    with (
        mock.patch.object(PositionInputs, "move", moved),
        mock.patch.object(CausalMask, "move", lambda self, position: slide(self, max(position - 1, 0))),
    ):
        yield


@contextmanager
def stale_row() -> Iterator[None]:
    """Never writes the last block's cache row at position 3, which keeps its earlier content."""
    commit = KVCache.commit

    def committed(self: KVCache, outputs: Mapping[str, Tensor], length: int) -> None:
        last = list(self.buffers.values())[-1]
        before = last[:, 3].clone()
        commit(self, outputs, length)
        if self.position - length <= 3 < self.position:
            last[:, 3] = before

    with mock.patch.object(KVCache, "commit", committed):
        yield


RUN = (rope_off_by_one, mask_off_by_one, stale_row)
"""Faults in the runtime."""


def faults(right: Right, found: Observed, is_quick: bool) -> Iterator[tuple[str, set[str]]]:
    """Yields the name of each fault and the checks that detect it: weights, numbers, or none.

    Args:
        is_quick: skips the check of numbers for faults that the weights already detect.
    """
    for plant in PLANTED:
        source, by = plant(right.source), set[str]()
        if any(True for _ in altered(right.path, source)):
            by.add("weights")
        if not (by and is_quick) and not judge(source, found).passed:
            by.add("numbers")
        yield plant.__name__, by
    for run in RUN:
        with run():
            changed = observed(Program(right.path))
        yield run.__name__, set() if judge(right.source, changed).passed else {"numbers"}


def exported(checkpoint: Path, quantize: str, kv_dtype: str, folder: Path) -> Right:
    """Exports a checkpoint with a quantisation scheme and cache dtype."""
    path = folder / f"{quantize}-{kv_dtype}.pte"
    options = ExportOptions(checkpoint=checkpoint, quantize=quantize, kv_dtype=kv_dtype, max_seq_len=256, output=path)
    made: Plan = plan(options)
    _write(made, options, [path], Progress())
    return Right(f"{quantize}, {kv_dtype} caches", path, made.source)


def random_file(name: str, model: Llama, scheme: Scheme, folder: Path, backend: str = "xnnpack") -> Right:
    """Exports a random model."""
    graph = GraphOptions(48, 7, attention="aten" if backend == "portable" or model.config.n_experts else "fused")
    made = planned(model, graph, scheme)
    return Right(name, write_pte(made, folder / "random.pte", backend), made.source)


def massive(seed: int) -> Llama:
    """Returns a random model with a few very large activations, as trained models have."""
    model = random_model(DEEP, seed)
    for layer in ("1", "3"):
        model.layers[layer].feed_forward.w2.weight[5].mul_(300)
    return model


def right_files(checkpoint: Path | None, only: str, folder: Path) -> Iterator[Right]:
    """Yields the files whose name contains `only`, each made on demand."""
    makers: dict[str, Callable[[], Right]] = {}
    for title, path, kinds in (("SmolLM2", checkpoint, SMOLLM2), ("stories", BUILT_IN, SMALL)):
        for quantize, kv in kinds if path else ():
            makers[f"{title}, {quantize}, {kv} caches"] = lambda path=path, q=quantize, kv=kv: exported(
                path, q, kv, folder
            )  # type: ignore[misc]
    for seed in (0, 1, 2):
        for scheme in ("fp32", "8da8w"):
            for title, build in (("random", lambda s: random_model(DEEP, s)), ("massive", massive)):
                makers[f"{title} {seed}, {scheme}"] = lambda b=build, s=seed, q=scheme: random_file(
                    "", b(s), SCHEMES[q], folder
                )  # type: ignore[misc]
    makers["experts, fp32"] = lambda: random_file("", random_model(MOE), SCHEMES["fp32"], folder)
    makers["experts, portable"] = lambda: random_file("", random_model(MOE), SCHEMES["fp32"], folder, "portable")
    for name, make in makers.items():
        if only in name:
            yield replace(make(), name=name)


def main() -> int:
    """Runs the check. Exits with 1 if a correct file is refused or a wrong one passes."""
    parser = argparse.ArgumentParser("python -m tests.bench.gate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, help="of a larger model, named SmolLM2 in the table")
    parser.add_argument("--only", default="", metavar="TEXT", help="files whose name has it")
    parser.add_argument("--quick", action="store_true", help="no numbers of faults that the weights already show")
    options = parser.parse_args()
    names, wrong = [fault.__name__.replace("_", " ") for fault in (*PLANTED, *RUN)], 0
    print(f"{len(names)} faults: {', '.join(names)}\n")
    print(
        "| right file | passes | error / limit | KL / limit | cached / limit | faults refused | by numbers | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for right in right_files(options.checkpoint, options.only, Path(folder)):
            start, found = time.monotonic(), observed(Program(right.path))
            fidelity, changed = judge(right.source, found), list(altered(right.path, right.source))
            results = dict(faults(right, found, options.quick))
            passed = [name for name, by in results.items() if not by]
            is_right = fidelity.passed and not changed
            wrong += len(passed) + (not is_right)
            limits, cached = fidelity.limits, fidelity.cached
            cells = [right.name, "yes" if is_right else f"NO: {fidelity}; {changed[:1]}"]
            cells += [f"{fidelity.error / limits.error:.2f}", f"{fidelity.kl / limits.kl:.2f}"]
            cells += [
                f"{cached.error / cached.limit:.2f}" if cached else "",
                f"{len(results) - len(passed)} of {len(results)}",
            ]
            cells[-1] += f": not {', '.join(passed)}" if passed else ""
            cells += [str(sum("numbers" in by for by in results.values())), f"{time.monotonic() - start:.0f}"]
            print("|", " | ".join(cells), "|", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
