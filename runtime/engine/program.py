"""Program: an opened and checked .pte; immutable, and shared by any number of sessions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from model.errors import InputError
from preproc.tokenizer import Tokenizer, from_bytes
from runtime.engine.executorch import Shard, check_requirements, start_threads, threads_off
from runtime.engine.sequential import SequentialShards
from runtime.engine.tensor_parallel import Alone, Group, ParallelSlices
from runtime.pte.metadata import Metadata, MethodSpec
from runtime.pte.parts import join_parts
from runtime.pte.trailer import check_file

SMALL = 16_000_000
"""Bytes of matrices below which several threads are slower than one; see tests/bench/NOTES.md."""


class Program:
    """A model that llama-pte exported, ready to run.

    It is one .pte, or several shards, which run some blocks each, or slices, which run a part of every block each.

    Attributes:
        metadata: the file's contents other than graph and weights; for shards or slices, those of the whole model.
        tokenizer: the tokenizer inside the file, or None.
    """

    def __init__(
        self,
        path: str | Path | Sequence[Path],
        *,
        threads: int | None = None,
        check: bool = True,
        memory_budget: int | None = None,
        partial: bool = False,
        group: Group | None = None,
    ) -> None:
        """Opens a file, a folder of shards or slices, or several files: checks them, reads their metadata, and loads
        their methods.

        Args:
            threads: number of ExecuTorch's threads, in the whole process. None means one per core, and only the
                caller's thread for a model of less than SMALL bytes.
            check: whether to compare the checksum, which reads the file through once.
            memory_budget: bytes that this process may hold, with one session. Shards that do not fit are loaded for
                each step; see `runtime.engine.memory_budget`. None keeps all in memory.
            partial: whether the files may be only some neighbouring shards of a model, see `Session.pass_on`.
            group: the processes that have the other slices; None if all slices are here. With a group, the caches have
                only the heads of the slices here.

        Raises:
            InputError: a file is damaged or not by llama-pte, the files are not one model, this runtime lacks a backend
                or operator, the memory budget is too small, or there is one for slices.
        """
        paths = files(Path(path)) if isinstance(path, str | Path) else path
        for each in paths:
            check_file(each, checksum=check)
        start_threads(threads)
        shards = [Shard(each) for each in paths]
        found = {shard.path: shard.metadata for shard in shards}
        self.metadata = join_parts(found, partial or group is not None)
        check_requirements(paths[0], self.metadata.requirements)
        self.tokenizer: Tokenizer | None = None
        if self.metadata.tokenizer:
            self.tokenizer = from_bytes(self.metadata.tokenizer, self.metadata.tokenizer_kind)
        self._is_small = threads is None and self.metadata.matrix_bytes < SMALL
        with threads_off(self._is_small):
            self._parts = self._loaded(shards, memory_budget, group)

    def _loaded(
        self, shards: Sequence[Shard], memory_budget: int | None, group: Group | None
    ) -> SequentialShards | ParallelSlices:
        """Loads the shards or slices and returns the object that runs them."""
        path, count = shards[0].path, shards[0].metadata.slices
        if count == 1 and group is not None:
            raise InputError(f"{path} is not a slice, which a group of processes needs; export with --tensor-parallel")
        if count == 1:
            return SequentialShards(shards, self.metadata, memory_budget)
        if len(shards) < count and group is None:
            raise InputError(
                f"{path} is one of {count} slices, which run only together; give all of them, or export with --shards"
            )
        if memory_budget is not None:
            raise InputError(
                f"--memory-budget is unsupported for slices, and {path} is one of {count}; leave --memory-budget out"
            )
        return ParallelSlices(shards, self.metadata, group or Alone())

    @property
    def bytes_loaded(self) -> int:
        """Bytes of matrices that are loaded again for each step."""
        return self._parts.bytes_loaded

    def step(self, method: MethodSpec, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs one method once.

        Args:
            inputs: contiguous tensors by the names of `method.inputs`; they are read in place.

        Returns:
            the outputs by the names of `method.outputs`, valid only until the next step of this program.
        """
        with threads_off(self._is_small):
            return self._parts.step(method, inputs)


def files(path: Path) -> list[Path]:
    """Returns the path of a .pte itself, or the .pte files in a folder of shards or slices.

    Raises:
        InputError: the folder has no .pte files.
    """
    if not path.is_dir():
        return [path]
    if found := sorted(path.glob("*.pte")):
        return found
    raise InputError(f"the folder {path} has no .pte files; give one with shards or slices, or a .pte")


def read_metadata(path: str | Path) -> Metadata:
    """Reads the metadata of a file, or of the whole model whose shards or slices are in a folder.

    Does not load the methods.

    Raises:
        InputError: a file is damaged or not by llama-pte, or the shards or slices are not one model.
    """
    found = {}
    for each in files(Path(path)):
        check_file(each)
        found[each] = Shard(each).metadata
    return join_parts(found)
