"""Report on the verification of a quantised file, saved beside it as JSON and as an HTML page."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from runtime.atomic_file import replacing

FIELDS = {
    "passed": "whether the file passed, and so was written",
    "failure": "reason why it failed, in a sentence; null if it passed",
    "file.name": "name of the .pte file",
    "file.bytes": "size of the file in bytes",
    "scheme": "format of the weights, in words; see export.weights.scheme.Scheme",
    "provenance": "versions, options and digests of the export; the file's get_provenance",
    "fidelity": "the .pte compared with the eager model, quantised in the same way, on prompts and generated tokens",
    "fidelity.rows": "number of rows of logits compared",
    "fidelity.max_abs": "largest absolute difference of a logit",
    "fidelity.error": "max_abs, relative to the standard deviation of the eager model's logits in that row",
    "fidelity.mse": "mean squared difference of logits",
    "fidelity.kl": "largest KL(eager || file) of a row, in nats",
    "fidelity.median_kl": "median KL(eager || file) of the rows, in nats",
    "fidelity.greedy_agreement": "share of rows whose most likely token is the same",
    "fidelity.limits.error": "limit of error",
    "fidelity.limits.kl": "limit of kl",
    "fidelity.limits.median_kl": "limit of median_kl",
    "fidelity.limits.channel": "limit of cached.error for a channel; larger if the eager model amplifies rounding more",
    "fidelity.limits.position": "limit of cached.error for a position",
    "fidelity.cached": "the keys or values whose error is largest relative to its limit",
    "fidelity.cached.name": "k_rows.N for keys or v_rows.N for values of block N",
    "fidelity.cached.along": "channel (error over all tokens) or position (error over all channels)",
    "fidelity.cached.error": "root mean square of the differences, relative to the block's keys or values for a "
    "channel, or to their spread over the tokens for a position",
    "fidelity.cached.limit": "limit of that error",
    "quality": "the quantised model compared with the float32 model on a text",
    "quality.text": "name of the text; `random tokens` if the file has no tokenizer",
    "quality.windows[]": "number of tokens predicted in each part of the text; parts are independent",
    "quality.finer[]": "flags that make the file more accurate, each by itself",
    "quality.limit": "largest relative increase of perplexity that passes",
    "quality.kl_limit": "largest mean KL that passes: log(1 + limit)",
    "quality.quantised": "the eager quantised model compared with the float32 model",
    "quality.file": "the .pte compared with the eager quantised model",
    "quality.file_float32": "the .pte compared with the float32 model",
    "quality.*.tokens": "number of tokens predicted",
    "quality.*.expected_perplexity": "perplexity of the model compared with; null for random tokens",
    "quality.*.perplexity": "exp of the mean negative log-likelihood of the tokens",
    "quality.*.increase": "perplexity / expected_perplexity - 1",
    "quality.*.mean_kl": "mean KL(expected || found), in nats",
    "quality.*.max_kl": "largest KL(expected || found), in nats",
    "quality.*.top_1": "share of tokens whose most likely prediction is the same",
    "quality.losses[].name": "name of a part of the model, such as tok_embeddings, layers.0 or head",
    "quality.losses[].own": "relative error of what the part adds to the residual stream (embedding and head: of its "
    "output), given its float32 input: |wrong - right|^2 / |right|^2, the mean over all tokens",
    "quality.losses[].stream": "relative error of its output, with all parts before it quantised as well",
    "quality.losses[].mse": "mean squared error of its output, with all parts before it quantised as well",
    "quality.losses[].linears": "relative error of each linear layer's output, given its float32 input",
    "quality.worst[]": "parts with the largest own error, and the worst linear layer of each",
    "quality.spans[]": "means over the positions from start to end - 1 in all parts of the text",
    "quality.spans[].start": "first position",
    "quality.spans[].end": "position after the last",
    "quality.spans[].kl": "mean KL(float32 || quantised), in nats",
    "quality.spans[].nll_increase": "increase of the negative log-likelihood, in nats; null for random tokens",
}
"""Fields of the JSON report. A number that is not finite is null."""

WIDTH, HEIGHT = 320, 120
"""Width and height of a plot's drawing area, in SVG units."""


def write_report(output: Path, content: Mapping[str, Any]) -> Path:
    """Writes `<output's stem>.report.json` and `.report.html` beside `output`, and returns the path of the HTML page.

    Args:
        content: the fields described in FIELDS.
    """
    plain = _plain(content)
    paths = [output.with_name(f"{output.stem}.report.{kind}") for kind in ("json", "html")]
    for path, text in zip(paths, (json.dumps(plain, indent=2, allow_nan=False) + "\n", page(plain)), strict=True):
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return paths[1]


def page(content: Mapping[str, Any]) -> str:
    """Returns the HTML page: a single file without scripts or external resources."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "percent": _percent}
    quality = content["quality"]
    spans, losses = quality["spans"], quality["losses"]
    by_position = [[span["kl"] for span in spans], [span["nll_increase"] for span in spans]]
    return environment.get_template("report.html").render(
        content,
        worst_names={name.split(" ")[0] for name in quality["worst"]},
        largest=max((loss["own"] or 0 for loss in losses), default=0) or 1,
        by_position=_plot(by_position, (spans[0]["start"], spans[-1]["end"] - 1)),
        by_layer=_plot([[loss["stream"] for loss in losses]], (losses[0]["name"], losses[-1]["name"])),
        width=WIDTH,
        height=HEIGHT,
    )


def _plot(series: Sequence[Sequence[float | None]], ends: tuple[Any, Any]) -> dict[str, Any]:
    """Returns the points of each series in a box of WIDTH and HEIGHT. The range of values includes 0; missing values
    are left out.
    """
    values = [value for one in series for value in one if value is not None]
    low, high = min([0.0, *values]), max([0.0, *values])
    tall, apart = (high - low) or 1.0, WIDTH / max(1, len(series[0]) - 1)

    def points(one: Sequence[float | None]) -> list[tuple[str, str]]:
        placed = ((i * apart, HEIGHT * (high - value) / tall) for i, value in enumerate(one) if value is not None)
        return [(f"{x:.1f}", f"{y:.1f}") for x, y in placed]

    return {"series": [points(one) for one in series], "low": low, "high": high, "zero": HEIGHT * high / tall} | {
        "ends": ends
    }


def _plain(value: Any) -> Any:
    """Converts a value to JSON types, with numbers rounded to six significant digits."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.3g}%"
