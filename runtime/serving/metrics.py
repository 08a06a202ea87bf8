"""The server's counters as text for Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

from runtime.serving.scheduler import Scheduler

CONTENT_TYPE = "text/plain; version=0.0.4"


def metrics(scheduler: Scheduler) -> str:
    """Returns the counters since the start and the present numbers of jobs, one a line."""
    totals, counts = scheduler.totals, scheduler.counts
    lines = list[str]()
    for name, kind, meaning, value in (
        ("requests_total", "counter", "Texts that were answered to their end.", totals.requests),
        ("prompt_tokens_total", "counter", "Prompt tokens that were run.", totals.prompt_tokens),
        ("cached_tokens_total", "counter", "Prompt tokens that were cached.", totals.cached_tokens),
        ("prompt_seconds_total", "counter", "Time of running prompts.", totals.prompt_seconds),
        ("tokens_total", "counter", "Tokens that were generated.", totals.tokens),
        ("token_seconds_total", "counter", "Time of generating tokens after the first.", totals.seconds),
        ("requests_active", "gauge", "Texts that are being generated.", counts["active"]),
        ("requests_waiting", "gauge", "Texts that wait for a session.", counts["waiting"]),
        ("sessions", "gauge", "Texts whose KV caches are kept.", counts["sessions"]),
    ):
        lines += [f"# HELP llama_pte_{name} {meaning}", f"# TYPE llama_pte_{name} {kind}", f"llama_pte_{name} {value}"]
    return "\n".join([*lines, ""])
