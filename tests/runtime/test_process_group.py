"""Tests a process group of one process; tests/runtime/test_pipeline.py tests several."""

import os

import pytest
import torch

from model.errors import InputError
from runtime.distributed.process_group import ProcessGroup, Ring, pin_cores


def test_a_single_process_receives_its_own_messages() -> None:
    process_group = ProcessGroup()
    assert (process_group.rank, process_group.count) == (0, 1)
    assert process_group.all_gather({"a": [1, None]}) == [{"a": [1, None]}]
    assert process_group.run_everywhere(lambda: 3) == 3
    ring, stream = Ring(process_group, dim=4), torch.rand(1, 3, 4)
    ring.send([1, 2], stream)
    ring.send([])
    integers, found = ring.receive()
    assert integers == [1, 2]
    assert found is stream
    assert ring.receive() == ([], None)
    ring.close()
    process_group.close()


def test_an_error_in_a_single_process_is_unchanged() -> None:
    def fail() -> None:
        raise InputError("the sea is not salty; add salt")

    with pytest.raises(InputError, match=r"^the sea is not salty; add salt$"):
        ProcessGroup().run_everywhere(fail)


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan")])
def test_an_impossible_timeout_is_refused(timeout: float) -> None:
    with pytest.raises(InputError, match=f"--timeout {timeout} is"):
        ProcessGroup(timeout)


def test_cores_are_shared_by_the_ranks_of_a_host_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.sched_getaffinity(0)
    try:
        assert pin_cores(None) is None
        assert pin_cores(3) == 3
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert pin_cores(None) == max((os.cpu_count() or 1) // 2, 1)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
        assert pin_cores(None) == 1
        monkeypatch.setenv("LLAMA_PTE_DEVICE", "cpu")
        assert pin_cores(2) == 2
        monkeypatch.setenv("LLAMA_PTE_DEVICE", "cpu:0")
        assert pin_cores(None) == 1
        assert os.sched_getaffinity(0) == {0}
        for wrong in ("gpu", "cpu:", "cpu:9999", "cpu:1-0"):
            monkeypatch.setenv("LLAMA_PTE_DEVICE", wrong)
            with pytest.raises(InputError, match=f"LLAMA_PTE_DEVICE={wrong} is invalid on this machine"):
                pin_cores(None)
    finally:
        os.sched_setaffinity(0, before)
