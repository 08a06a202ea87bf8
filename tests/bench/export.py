"""Wall time and memory of exporting one checkpoint, stage by stage, compared with ExecuTorch's own export of it.

python -m tests.bench.export --peer                       # a random checkpoint of Llama 3.2 1B's shape
python -m tests.bench.export --layers 4 8 16              # the same with fewer layers, and the slope
python -m tests.bench.export --shape 8b                   # Llama 3.1 8B's shape: 16 GB on disk
python -m tests.bench.export --checkpoint path/to/Meta-folder --peer

Memory is anonymous RSS, which excludes mapped files. Run nothing else at the same time.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from export.checkpoints.weight_names import HUGGING_FACE_NAMES

SHAPES = {
    "1b": {"dim": 2048, "n_layers": 16, "ffn_dim_multiplier": 1.5, "multiple_of": 256},
    "8b": {"dim": 4096, "n_layers": 32, "ffn_dim_multiplier": 1.3, "multiple_of": 1024},
}
"""Entries of params.json in which Llama 3.2 1B and Llama 3.1 8B differ."""
SHARED = {"n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-5, "rope_theta": 500000.0}
HIDDEN = {"1b": 8192, "8b": 14336}


@dataclass(frozen=True)
class Stage:
    """One stage of a run: its end in seconds after the start, and its peak of anonymous memory in bytes."""

    name: str
    end: float
    peak: int


def write_checkpoint(folder: Path, shape: str, layers: int, tied: bool) -> Path:
    """Writes a random bf16 checkpoint of a shape with `layers` layers, as a Meta folder or, if tied, a Hugging Face
    folder.
    """
    generator = torch.Generator().manual_seed(0)
    params = SHAPES[shape] | SHARED | {"n_layers": layers, "use_scaled_rope": True}
    dim, hidden, vocabulary = params["dim"], HIDDEN[shape], params["vocab_size"]

    def weight(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    state = {f"{name}.weight": weight(vocabulary, dim) for name in ("tok_embeddings", "output")}
    state["norm.weight"] = torch.ones(dim, dtype=torch.bfloat16)
    kv = dim // params["n_heads"] * params["n_kv_heads"]
    shapes = {"attention.wq": (dim, dim), "attention.wk": (kv, dim), "attention.wv": (kv, dim)}
    shapes |= {"attention.wo": (dim, dim), "feed_forward.w1": (hidden, dim), "feed_forward.w3": (hidden, dim)}
    shapes |= {"feed_forward.w2": (dim, hidden)}
    for layer in range(layers):
        state |= {f"layers.{layer}.{name}.weight": weight(*size) for name, size in shapes.items()}
        norms = ("attention_norm", "ffn_norm")
        state |= {f"layers.{layer}.{name}.weight": torch.ones(dim, dtype=torch.bfloat16) for name in norms}
    folder.mkdir(parents=True)
    if tied:
        write_tied(folder, state, params | {"hidden_dim": hidden})
    else:
        torch.save(state, folder / "consolidated.00.pth")
        (folder / "params.json").write_text(json.dumps(params))
    return folder


def write_tied(folder: Path, state: dict[str, torch.Tensor], params: Mapping[str, Any]) -> None:
    """Writes a Hugging Face folder without a separate head."""
    theirs = {pattern.replace("head.", ""): name for pattern, name in HUGGING_FACE_NAMES.items()}
    weights = {}
    for name, tensor in state.items():
        layer = re.search(r"\d+", name)
        pattern = theirs[re.sub(r"\.\d+\.", ".*.", name)]
        weights[pattern.replace("*", layer[0]) if layer and "*" in pattern else pattern] = tensor
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": params["dim"],
        "intermediate_size": params["hidden_dim"],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params["n_kv_heads"],
        "vocab_size": params["vocab_size"],
        "max_position_embeddings": 131072,
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params["rope_theta"],
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))


def measured(command: Sequence[str], stage: str, folder: Path | None = None) -> list[Stage]:
    """Runs a command in `folder` and measures each of its stages.

    Args:
        stage: a regular expression whose first group is the name of the stage that a line of stderr ends.
    """
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=folder)
    start, ends, samples = time.monotonic(), list[tuple[str, float]](), list[tuple[float, int]]()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            print(f"    {line.rstrip()}", file=sys.stderr)
            if found := re.match(stage, line):
                ends.append((found[1], time.monotonic() - start))

    reader = threading.Thread(target=read)
    reader.start()
    while process.poll() is None:
        samples.append((time.monotonic() - start, anonymous(process.pid)))
        time.sleep(0.05)
    reader.join()
    if process.returncode:
        raise SystemExit(f"error: {' '.join(command)} ended with {process.returncode}")
    stages, begin = [], 0.0
    for name, end in [*ends, ("rest", time.monotonic() - start)]:
        stages.append(Stage(name, end, max((size for at, size in samples if begin <= at < end), default=0)))
        begin = end
    return stages


def anonymous(process: int) -> int:
    """Returns the anonymous RSS of a process in bytes, or 0 if it has ended."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def ours(checkpoint: Path, output: Path, flags: Sequence[str]) -> list[Stage]:
    """Returns the command of this project's export."""
    command = [sys.executable, "-m", "export.llama", "--checkpoint", str(checkpoint), "--tokenizer", "none", "--force"]
    command += ["--max-seq-len", "2048", *flags, "--output", str(output)]
    return measured(command, r"(open|lower|assemble|write|verify) ")


def theirs(checkpoint: Path, output: Path, max_seq_len: int = 2048) -> list[Stage]:
    """Runs ExecuTorch's export with 8da4w in groups of 32 and an 8-bit embedding."""
    settings = {
        "base.model_class": "llama3_2",
        "base.checkpoint": (checkpoint / "consolidated.00.pth").resolve(),
        "base.params": (checkpoint / "params.json").resolve(),
        "model.use_kv_cache": "true",
        "model.use_sdpa_with_kv_cache": "true",
        "model.dtype_override": "fp32",
        "quantization.qmode": "8da4w",
        "quantization.group_size": 32,
        "quantization.embedding_quantize": "'8,0'",
        "backend.xnnpack.enabled": "true",
        "backend.xnnpack.extended_ops": "true",
        "export.max_seq_length": max_seq_len,
        "export.max_context_length": max_seq_len,
        "export.output_name": output.resolve(),
    }
    module = "executorch.extension.llm.export.export_llm"
    command = [sys.executable, "-m", module, *(f"{key}={value}" for key, value in settings.items())]
    return measured(command, r"(?!x)(x)", output.parent)


def table(title: str, stages: Sequence[Stage], size: int) -> str:
    """Formats a run: time and peak memory of each stage, and of the whole with and without verify."""
    lines, begin, without = [f"{title}: {size / 1e6:.0f} MB"], 0.0, 0.0
    for stage in stages:
        lines.append(f"  {stage.name:8}{stage.end - begin:8.1f} s{stage.peak / 1e9:8.2f} GB")
        without += 0 if stage.name == "verify" else stage.end - begin
        begin = stage.end
    peak = max(stage.peak for stage in stages)
    lines.append(f"  {'whole':8}{begin:8.1f} s{peak / 1e9:8.2f} GB   without verify {without:.1f} s")
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser("python -m tests.bench.export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--checkpoint", type=Path, help="a Meta folder to export, in place of random ones")
    parser.add_argument("--shape", choices=SHAPES, default="1b", help="of the random checkpoints (default: 1b)")
    parser.add_argument("--layers", type=int, nargs="+", help="of the random checkpoints (default: the shape's own)")
    parser.add_argument("--tied", action="store_true", help="random checkpoints whose embedding and head are one")
    parser.add_argument(
        "--quantize",
        nargs="+",
        default=["8da4w"],
        help="schemes to export to, with further flags: '8da4w --embedding-bits 4' (default: 8da4w)",
    )
    parser.add_argument("--peer", action="store_true", help="also export the last one with ExecuTorch's export_llm")
    options = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "executorch", "torchao"))
    print(
        f"{date.today()}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {versions}"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoints = (
            {None: options.checkpoint}
            if options.checkpoint
            else {
                layers: write_checkpoint(
                    folder / f"{options.shape}-{layers}-layers", options.shape, layers, options.tied
                )
                for layers in options.layers or [SHAPES[options.shape]["n_layers"]]
            }
        )
        for scheme in options.quantize:
            peaks = []
            for layers, checkpoint in checkpoints.items():
                stages = ours(checkpoint, folder / "ours.pte", ["--quantize", *scheme.split()])
                print(table(f"{checkpoint.name} to {scheme}", stages, (folder / "ours.pte").stat().st_size), flush=True)
                peaks.append((layers, max(stage.peak for stage in stages), stages[-1].end))
            if len(peaks) > 1:
                (few, low, soon), (many, high, late) = peaks[0], peaks[-1]
                print(
                    f"slope: {(high - low) / (many - few) / 1e6:+.1f} MB a layer, "
                    f"{(late - soon) / (many - few):+.2f} s a layer"
                )
        if options.peer:
            stages = theirs(checkpoint, folder / "theirs.pte")
            print(table("ExecuTorch's export_llm", stages, (folder / "theirs.pte").stat().st_size))


if __name__ == "__main__":
    main()
