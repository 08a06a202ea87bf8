"""Compares quantisation schemes by file size, perplexity and top-1 agreement on a text, and prints a table.

python -m tests.bench.quantize valid.txt --calibrate train.txt
python -m tests.bench.quantize valid.txt --checkpoint stories260K.bin --tokenizer tok512.model
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from export.checkpoints.layouts import BUILT_IN
from export.llama import export_llama
from export.planning.plan import ExportOptions, plan
from export.planning.scheme_search import choose_scheme
from export.quality.eager import packed
from export.quality.gptq import calibrate
from export.quality.layer_errors import measure_layer_errors
from export.quality.perplexity import Comparison, Gate, Rows, windows
from export.weights.source import WeightSource

SCHEMES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "8da8w": {"quantize": "8da8w"},
    "mixed": {"quantize": "mixed"},
    "8da4w": {"quantize": "8da4w"},
    "8da4w --head-bits 4": {"quantize": "8da4w", "head_bits": 4},
    "8da4w --head-bits 4 --rounding hqq": {"quantize": "8da4w", "head_bits": 4, "rounding": "hqq"},
    "8da4w --head-bits 4 --rounding importance": {"quantize": "8da4w", "head_bits": 4, "rounding": "importance"},
    "8da4w --head-bits 4 --calibrate": {"quantize": "8da4w", "head_bits": 4},
    "q4_0": {"quantize": "q4_0"},
    "q4_0 --rounding importance": {"quantize": "q4_0", "rounding": "importance"},
    "q4_0 --calibrate": {"quantize": "q4_0"},
    "8da4w --head-bits 4 --group-size 64": {"quantize": "8da4w", "head_bits": 4, "group_size": 64},
    "8da4w --embedding-bits 4": {"quantize": "8da4w", "embedding_bits": 4},
}
AT_ONCE = 4


def predicted(source: WeightSource, texts: Sequence[Sequence[int]], max_seq_len: int) -> Comparison:
    """Compares the quantised model's predictions with float32's, a few windows at a time."""
    rows = list[Rows]()
    for start in range(0, len(texts), AT_ONCE):
        part = texts[start : start + AT_ONCE]
        targets = torch.tensor([token for text in part for token in text[1:]])

        def take(first: int, exact: torch.Tensor, found: torch.Tensor, targets: torch.Tensor = targets) -> None:
            rows.append(Rows.of(exact, found, targets[first : first + len(exact)]))

        measure_layer_errors(source, packed(source.config, [text[:-1] for text in part], max_seq_len), take)
    return Rows.concatenate(rows).comparison(is_text=True)


def row(options: ExportOptions, tokens: int, text: str, folder: Path) -> tuple[int, Comparison]:
    """Returns the file size in bytes, and the comparison with float32 on the text."""
    size = export_llama(options).stat().st_size
    planned = plan(options)
    planned = choose_scheme(planned, Gate.of(options.eval_text, None), auto=False, note=print)
    source, max_seq_len = planned.source, planned.provenance["options"]["max_seq_len"]
    if planned.texts:
        source = calibrate(source, planned.texts, max_seq_len, folder)
    assert planned.tokenizer, "a text needs a tokenizer"
    texts = windows(planned.tokenizer.encode(text), planned.provenance["bos_id"], max_seq_len, tokens)
    return size, predicted(source, texts, max_seq_len)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser("python -m tests.bench.quantize", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("text", type=Path, help="to measure on")
    parser.add_argument("--calibrate", type=Path, help="text for the calibrated row; without it there is none")
    parser.add_argument("--checkpoint", type=Path, default=BUILT_IN)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--tokens", type=int, default=8192, help="of the text (default: %(default)s)")
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    text = text[: options.tokens * 8]
    print("| scheme | file | perplexity | over fp32 | mean KL | top-1 |\n|---|---|---|---|---|---|")
    for name, settings in SCHEMES.items():
        is_calibrated = "--calibrate" in name
        if is_calibrated and options.calibrate is None:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            wanted = ExportOptions(
                checkpoint=options.checkpoint,
                tokenizer=options.tokenizer,
                max_seq_len=512,
                output=Path(scratch) / "a.pte",
                eval_text=None if name == "fp32" else options.text,
                max_ppl_increase=None if name == "fp32" else 10.0,
                calibrate=options.calibrate if is_calibrated else None,
                **settings,
            )
            size, found = row(wanted, options.tokens, text, Path(scratch))
        cells = (f"`{name}`", f"{size / 1e6:.2f} MB", f"{found.perplexity:.3f}", f"{found.increase:+.2%}")
        print("|", " | ".join((*cells, f"{found.mean_kl:.4f}", f"{found.top_1:.1%}")), "|", flush=True)


if __name__ == "__main__":
    main()
