"""Tests runtime.placement: assignments against all possible ones, and predicted rates against a simulation."""

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.planning.plan import ExportOptions
from export.planning.sharding import Sharding
from model.errors import InputError
from runtime import placement as command
from runtime.distributed.placement import Host, assign_shards, place_shards, read_hosts, to_toml
from tests.conftest import MODELS, exported
from tests.support.ranks import ended, start

SECONDS = st.one_of(st.integers(1, 9).map(float), st.just(math.inf))


@settings(max_examples=200)
@given(data=st.data(), idle=st.booleans())
def test_no_other_assignment_is_faster(data: st.DataObject, idle: bool) -> None:
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    seconds = st.lists(SECONDS, min_size=len(sizes), max_size=len(sizes)).map(tuple)
    hosts = data.draw(st.lists(st.builds(Host, st.just("h"), st.integers(0, 15), seconds), min_size=1, max_size=4))

    def slowest(ends: tuple[int, ...]) -> float:
        """Returns the slowest host's time in an assignment; host i has the shards before ends[i] that no host before it
        has.
        """
        worst = 0.0
        for host, first, end in zip(hosts, (0, *ends), ends, strict=False):
            if sum(sizes[first:end]) > host.memory or (first == end and not idle):
                return math.inf
            worst = max(worst, sum(host.seconds[first:end]))
        return worst

    ways = itertools.combinations_with_replacement(range(len(sizes) + 1), len(hosts) - 1)
    best = min(slowest((*ends, len(sizes))) for ends in ways)
    if math.isinf(best):
        with pytest.raises(InputError, match="shards"):
            assign_shards(hosts, sizes, idle)
    else:
        spans = assign_shards(hosts, sizes, idle)
        assert [number for span in spans for number in span] == list(range(len(sizes)))
        assert slowest(tuple(span.stop for span in spans)) == best


@settings(max_examples=100)
@given(
    seconds=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    latency=st.integers(0, 20),
    transfer=st.integers(0, 12),
    texts=st.integers(1, 12),
)
def test_the_rate_equals_a_simulations(seconds: list[int], latency: int, transfer: int, texts: int) -> None:
    """Simulates texts that circle through the hosts, each of which computes and then sends one at a time."""
    count = len(seconds)
    link = 100 / transfer if transfer else math.inf
    hosts = [
        Host(f"h{i}", 1, tuple(float(s) if i == j else math.inf for j, s in enumerate(seconds)), latency, link)
        for i in range(count)
    ]
    found = place_shards(hosts, [1] * count, message=100, texts=texts)
    free, busy, there, steps = [0.0] * count, [0.0] * count, [0.0] * texts, 60
    for _ in range(steps):
        for host in range(count):
            for text in range(texts):
                free[host] = max(free[host], there[text]) + seconds[host]
                there[text] = free[host]
                if count > 1:
                    busy[host] = max(busy[host], free[host]) + transfer
                    there[text] = busy[host] + latency
    assert found.rate == pytest.approx(steps * texts / max(there), rel=0.12)
    assert 1 / found.round == pytest.approx(1 / (sum(seconds) + (count > 1) * count * (transfer + latency)))


def test_hundreds_of_hosts_are_assigned_in_seconds() -> None:
    hosts = [Host(f"h{i}", 10, tuple(1.0 + (i * j) % 7 for j in range(126)), 0.1, 100.0) for i in range(400)]
    found = place_shards(hosts, [5] * 126, message=10)
    assert [number for span in found.spans for number in span] == list(range(126))
    assert all(len(span) <= 2 for span in found.spans)


def test_a_file_of_hosts_survives_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "hosts.toml"
    hosts = [Host("a", 3_000_000_000, (0.25, 0.5), 0.001, 1e8), Host("b", 5, (1.0, 2.0))]
    path.write_text("\n\n".join(map(to_toml, hosts)))
    assert read_hosts(path, [1, 1]) == hosts
    path.write_text('[[hosts]]\nname = "c"\ncount = 2\nmemory = "1kB"\nspeed = "2GB"\n')
    assert read_hosts(path, [4_000_000_000, 1_000_000_000]) == [Host(f"c {i}", 1000, (2.0, 0.5)) for i in (1, 2)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'hosts'"),
        ("[[hosts]", "toml is invalid"),
        ('[[hosts]]\nname="a"\nmemory="1GB"', "a needs either seconds or speed"),
        ('[[hosts]]\nname="a"\nmemory="1GB"\nspeed="1GB"\nseconds=[1]', "a needs either seconds or speed"),
        ('[[hosts]]\nname="a"\nmemory="1GB"\nseconds=[1]', "a has the seconds of 1 shards, but there are 2"),
        ('[[hosts]]\nname="a"\nmemory="much"\nspeed="1GB"', "much is invalid"),
        ('[[hosts]]\nname="a"\nmemory="1GB"\nspeed="1GB"\nspeeed="1GB"', "speeed is unknown"),
    ],
)
def test_an_invalid_file_of_hosts_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "hosts.toml").write_text(text)
    with pytest.raises(InputError, match=re.escape(words)):
        read_hosts(tmp_path / "hosts.toml", [1, 1])


def test_the_command_plans_with_measurements_of_ranks(
    stories260k: ExportOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = exported(
        replace(stories260k, prefill_chunk=16, sharding=Sharding(5), output=MODELS / "pipeline-stories260K-5.shards")
    )
    done = ended(start([["runtime.placement", shards, "--measure"]] * 2))
    assert [(code, bool(out)) for code, out, _ in done] == [(0, True), (0, False)]
    hosts = tmp_path / "hosts.toml"
    hosts.write_text(done[0][1])
    sizes = [1] * 5
    assert [host.link < math.inf and min(host.seconds) > 0 for host in read_hosts(hosts, sizes)] == [True, True]
    assert command.main([str(shards), "--hosts", str(hosts), "--texts", "3"]) == 0
    assert re.search(r"tok/s with 3 texts together, [\d.]+ tok/s with one; bound by ", capsys.readouterr().out)
    hosts.write_text('[[hosts]]\nname = "small"\nmemory = "10kB"\nspeed = "1GB"\n')
    with pytest.raises(InputError, match="cannot be assigned in order to 1 hosts with 0 MB"):
        command.main([str(shards), "--hosts", str(hosts)])
