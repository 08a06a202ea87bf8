from pathlib import Path

import httpx
import pytest

from runtime import serve
from tests.support.serving import serving


def test_prometheus_reads_what_was_done(toy_pte: Path) -> None:
    with serving(serve.open_model(toy_pte), sessions=1) as server:
        first = server.post("completions", prompt="Once upon a time", max_tokens=3, ignored=1).json()
        second = server.post("completions", prompt="Once upon a time", max_tokens=4).json()
        server.wait_for(active=0)
        answer = httpx.get(f"{server.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = [line.split(" ", 3) for line in answer.text.splitlines()]
    values = {name.removeprefix("llama_pte_"): float(value) for name, value, *_ in lines if name != "#"}
    kinds = {words[2].removeprefix("llama_pte_"): words[3] for words in lines if words[:2] == ["#", "TYPE"]}
    assert kinds == {name: "counter" if name.endswith("_total") else "gauge" for name in values}
    timings = [first["timings"], second["timings"]]
    assert values["requests_total"] == 2
    assert values["tokens_total"] == 7
    assert values["prompt_tokens_total"] == sum(each["prompt_n"] for each in timings)
    assert values["cached_tokens_total"] == sum(each["cache_n"] for each in timings) > 0
    assert values["prompt_seconds_total"] * 1e3 == pytest.approx(sum(each["prompt_ms"] for each in timings))
    assert values["token_seconds_total"] * 1e3 == pytest.approx(sum(each["predicted_ms"] for each in timings))
    assert (values["requests_active"], values["requests_waiting"]) == (0, 0)
    assert values["sessions"] >= 1
