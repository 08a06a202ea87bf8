"""Report on the verification of a quantised file, saved beside it as JSON and as an HTML page."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from export.atomic_file import replacing

FIELDS = {
    "passed": "whether the file was written, or would be",
    "failure": "why not, in a sentence; null where it passed",
    "file.name": "the .pte",
    "file.bytes": "its size",
    "scheme": "how weights are stored, in words; see export.weights.scheme.Scheme",
    "provenance": "what made it, as in the file's get_provenance",
    "fidelity": "the .pte against the eager model, quantised in the same way: prompts, then tokens it chose itself",
    "fidelity.rows": "rows of logits compared",
    "fidelity.max_abs": "largest absolute difference of a logit",
    "fidelity.error": "the same in standard deviations of the eager model's logits in that row",
    "fidelity.mse": "mean squared difference of logits",
    "fidelity.kl": "largest KL(eager || file) of a row, in nats",
    "fidelity.median_kl": "median of the rows' divergences",
    "fidelity.greedy_agreement": "share of the rows whose likeliest token is the same",
    "fidelity.limits.error": "what is allowed of error",
    "fidelity.limits.kl": "what is allowed of kl",
    "fidelity.limits.median_kl": "what is allowed of median_kl",
    "fidelity.limits.channel": "what is allowed of a channel's cached.error, where the model differs less from itself",
    "fidelity.limits.position": "what is allowed of a position's",
    "fidelity.cached": "the keys or values that differ most for what is allowed there",
    "fidelity.cached.name": "k_rows (keys) or v_rows (values), and the block",
    "fidelity.cached.along": "whose error it is: a channel's, over all tokens, or a position's, over all channels",
    "fidelity.cached.error": "root mean square of its differences, relative to the block's keys or values (a "
    "channel's), or to their spread over the tokens (a position's)",
    "fidelity.cached.limit": "what is allowed of that",
    "quality": "the quantised model against float32, on a text",
    "quality.text": "the text's name, or `random tokens` where the file has no tokenizer",
    "quality.windows[]": "tokens predicted in each part of the text; none sees another",
    "quality.finer[]": "flags that lose less, each by itself",
    "quality.limit": "largest relative increase of perplexity that passes",
    "quality.kl_limit": "largest mean KL that passes: log(1 + limit), what such an increase comes to",
    "quality.quantised": "the eager quantised model against float32",
    "quality.file": "the .pte against the eager quantised model",
    "quality.file_float32": "the .pte against float32",
    "quality.*.tokens": "tokens predicted",
    "quality.*.expected_perplexity": "of what is compared with; null for random tokens",
    "quality.*.perplexity": "exp of the mean negative log-likelihood of the tokens",
    "quality.*.increase": "perplexity / expected_perplexity - 1",
    "quality.*.mean_kl": "mean KL(expected || found), in nats",
    "quality.*.max_kl": "the largest",
    "quality.*.top_1": "share of the tokens for which the likeliest prediction is the same",
    "quality.losses[].name": "a piece of the model: tok_embeddings, layers.0, head",
    "quality.losses[].own": "error of what the piece adds to the stream (embedding, head: of its result), given what "
    "it is given in float32: |wrong - right|^2 / |right|^2, the mean over all tokens",
    "quality.losses[].stream": "relative error of its result, with all pieces before it quantised as well",
    "quality.losses[].mse": "mean squared difference of the values, not relative, else the same",
    "quality.losses[].linears": "relative error of each linear layer's result, given what it is given in float32",
    "quality.worst[]": "the pieces with the largest own error, and the worst linear layer of each",
    "quality.spans[]": "means over the positions start to end - 1 of all windows",
    "quality.spans[].start": "the first position",
    "quality.spans[].end": "behind the last",
    "quality.spans[].kl": "mean KL(float32 || quantised), in nats",
    "quality.spans[].nll_increase": "growth of the negative log-likelihood, in nats; null for random tokens",
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
