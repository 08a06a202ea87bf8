import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from export import inspect as command
from export.inspect import describe
from export.planning.memory import activation_bytes, cache_bytes, matrix_bytes, memory_use
from export.weights.scheme import SCHEMES
from model.config import ModelConfig
from model.model import Llama
from runtime.engine.kv_cache import KVCache
from runtime.engine.program import read_metadata
from tests.conftest import TOY
from tests.support.kinds import KINDS, PLAIN, metadata_of

MEASURE = """
    import sys, torch
    torch.set_num_threads(1)
    import runtime.generate
    from runtime.engine.program import Program
    from runtime.engine.session import Session
    def anonymous():
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
    torch.bmm(torch.ones(4, 64, 64), torch.ones(4, 64, 64))
    before = anonymous()
    program = Program(sys.argv[1], threads=1)
    session = Session(program)
    for buffer in session.cache.buffers.values():
        buffer.fill_(0)
    session.prefill([1] * (session.capacity - 1))
    session.decode(1)
    print(anonymous() - before)
"""

FP32 = SCHEMES["fp32"]


def test_parameters_are_counted_by_part(toy_pte: Path) -> None:
    metadata = read_metadata(toy_pte)
    assert cache_bytes(TOY, TOY.context) == KVCache(metadata.methods[0], TOY.context).filled_bytes(TOY.context)
    matrices = [p for name, p in Llama(TOY).named_parameters() if p.dim() == 2 and "tok_embeddings" not in name]
    assert matrix_bytes(replace(TOY, tied=False), FP32) == 4 * (
        sum(p.numel() for p in matrices) + TOY.vocab_size * TOY.dim
    )
    assert memory_use(metadata).weights == matrix_bytes(TOY, FP32), "decode and prefill share them"
    assert memory_use(metadata).activations == activation_bytes(TOY, metadata.methods[0], TOY.context)
    portable = replace(metadata, requirements=replace(metadata.requirements, backends=()))
    assert memory_use(portable).weights == 0


@pytest.mark.parametrize("name", KINDS)
def test_caches_of_every_kind_are_counted(name: str) -> None:
    metadata = metadata_of(KINDS[name])
    held = KVCache(metadata.methods[0], metadata.max_seq_len).filled_bytes(metadata.max_seq_len)
    assert memory_use(metadata).caches == held
    by_context = describe(metadata, 0)["cache_bytes_by_context"]
    assert by_context == ({metadata.max_seq_len: held} if metadata.use_kv_cache else {})


@pytest.mark.parametrize("config", [replace(PLAIN, gated=False), replace(PLAIN, n_experts=4, n_chosen_experts=2)])
def test_matrices_of_other_feed_forwards_are_counted(config: ModelConfig) -> None:
    matrices = [p for name, p in Llama(config).named_parameters() if p.dim() == 2 and "tok_embeddings" not in name]
    assert matrix_bytes(config, FP32) == 4 * sum(p.numel() for p in matrices)


@pytest.mark.parametrize("name", ["tiny_pte", "stories_pte"])
def test_planned_memory_is_that_of_a_run(name: str, request: pytest.FixtureRequest) -> None:
    """Allows a quarter, and the memory of the allocator and the bindings."""
    pte = request.getfixturevalue(name)
    call = [sys.executable, "-c", textwrap.dedent(MEASURE), str(pte)]
    done = subprocess.run(call, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    taken, planned = int(done.stdout), memory_use(read_metadata(pte)).total
    assert 0.75 * planned - 4e6 < taken < 1.25 * planned + 4e6


def test_the_command_prints_all_of_it(toy_pte: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(toy_pte)]) == 0
    text = capsys.readouterr().out
    for part in ("dim 32", "48 positions", "BOS 1, stop [1, 2]", "forward (1 to 7)", "XnnpackBackend", "total"):
        assert part in text
    assert command.main([str(toy_pte), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory"]["total"] == memory_use(read_metadata(toy_pte)).total
    assert found["file_bytes"] == toy_pte.stat().st_size
    assert found["cache_bytes_by_context"]["48"] == cache_bytes(TOY, 48)
