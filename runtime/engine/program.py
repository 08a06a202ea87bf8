"""Program: an opened .pte, checked before it is believed; immutable, and shared by any number of sessions."""

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
"""Bytes of matrices below which waking another thread takes longer than it saves; see tests/bench/NOTES.md."""


class Program:
    """A model of ours, ready to be run: a .pte and its methods; the shards of one, each of which runs its blocks; or
    slices, each of which runs a part of every block.

    Attributes:
        metadata: all that the file carries beside graph and weights; of shards or slices, what the whole would.
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
        """Opens the file, the folder of shards or slices, or these: checks them, reads their metadata, and loads their
        methods.

        Args:
            threads: how many threads ExecuTorch uses, in the whole process; None leaves its choice, one per core,
                and runs a model of less than SMALL bytes in the caller's.
            check: compare the checksum, which reads the file through once.
            memory_budget: bytes that this process may hold, with one session. Shards for which there is no room are
                loaded for each step; see `runtime.engine.memory_budget`. None keeps all.
            partial: these may be some neighbours among the shards of a model, see `Session.pass_on`.
            group: of the processes that have the other slices, where these are not all; None where they are. The caches
                then have only these slices' heads.

        Raises:
            InputError: the budget is too little, or for slices; not a whole file of ours, shards or slices that do not
                make one model, or this runtime lacks what it needs.
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
        """What runs them."""
        path, count = shards[0].path, shards[0].metadata.slices
        if count == 1 and group is not None:
            raise InputError(f"{path} is no slice, as those of a group of processes are; export with --tensor-parallel")
        if count == 1:
            return SequentialShards(shards, self.metadata, memory_budget)
        if len(shards) < count and group is None:
            raise InputError(
                f"{path} is one of {count} slices, which run at once and not one behind another; export with --shards"
            )
        if memory_budget is not None:
            raise InputError(
                f"--memory-budget is for shards, and {path} is one of {count} slices, which all stay in memory; leave "
                "it out"
            )
        return ParallelSlices(shards, self.metadata, group or Alone())

    @property
    def bytes_loaded(self) -> int:
        """Bytes of matrices that are loaded anew for each step."""
        return self._parts.bytes_loaded

    def step(self, method: MethodSpec, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs one method once.

        Args:
            inputs: contiguous tensors by the names of `method.inputs`, read in place.

        Returns:
            outputs by the names of `method.outputs`, valid only until the next step of this program.
        """
        with threads_off(self._is_small):
            return self._parts.step(method, inputs)


def files(path: Path) -> list[Path]:
    """The .pte, or those in a folder of shards or slices.

    Raises:
        InputError: the folder has none.
    """
    if not path.is_dir():
        return [path]
    if found := sorted(path.glob("*.pte")):
        return found
    raise InputError(f"the folder {path} has no .pte files; give one with shards or slices, or a .pte")


def read_metadata(path: str | Path) -> Metadata:
    """Reads what a file carries, or what the whole would whose shards or slices a folder has, without loading
    its methods.

    Raises:
        InputError: not a whole file of ours, or shards or slices that do not make one model.
    """
    found = {}
    for each in files(Path(path)):
        check_file(each)
        found[each] = Shard(each).metadata
    return join_parts(found)
