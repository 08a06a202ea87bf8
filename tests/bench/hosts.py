"""Throughput of four texts on several ranks relative to one rank, with one thread each, and the prediction of
runtime.placement. The model has the 110M shape.

python -m tests.bench.hosts
python -m tests.bench.hosts --ranks 4 --network    # in network namespaces, with links of 100 Mbit/s; as root
python -m tests.bench.hosts --rounds 5 --quantize 8da8w

Each round measures every configuration once; ratios are within a round. Run nothing else at the same time.
"""

import argparse
import json
import re
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from model.config import ModelConfig
from model.model import Llama
from tests.bench.peers import FOLDER, export
from tests.support.checkpoints import write_llama2c
from tests.support.ranks import ended, hosts, start

SHAPE = ModelConfig(
    dim=768, n_layers=12, n_heads=12, n_kv_heads=12, head_dim=64, hidden_dim=2048, vocab_size=32000, context=1024,
    tied=True,
)  # fmt: skip
TEXTS, TOKENS = 4, 96


Place = tuple[Sequence[Mapping[str, str]] | None, Sequence[Sequence[str]] | None]
"""The `environments` and `prefixes` that `start` takes."""


def rate(folder: Path, prompts: Path, ranks: int, place: Place) -> float:
    """Returns the throughput of all texts in tokens per second."""
    flags = ["--hosts", _hosts(folder, ranks), "--prompts-file", prompts, "--max-new-tokens", str(TOKENS)]
    command = ["runtime.pipeline", folder, "--no-check", *flags, "--texts", str(TEXTS), "--threads", "1"]
    return _number(start([command] * ranks, *place), r"([\d.]+) tok/s")


def planned(folder: Path, ranks: int, place: Place) -> float:
    """Returns the throughput that runtime.placement predicts, measured on all ranks at once. Writes the file of hosts
    for `rate`.
    """
    measured = ended(start([["runtime.placement", folder, "--measure", "--threads", "1"]] * ranks, *place), within=600)
    assert measured[0][0] == 0, measured[0][2]
    _hosts(folder, ranks).write_text(measured[0][1])
    command = ["runtime.placement", folder, "--hosts", _hosts(folder, ranks), "--texts", str(TEXTS)]
    return _number(start([command]), r"(?m)^([\d.]+) tok/s")


def _number(ranks: Sequence[subprocess.Popen[str]], pattern: str) -> float:
    """Waits for all ranks and returns the number that the first one printed."""
    code, out, error = ended(ranks, within=600)[0]
    found = re.search(pattern, out + error)
    assert code == 0, error
    assert found, out + error
    return float(found[1])


def _hosts(folder: Path, ranks: int) -> Path:
    return folder.with_suffix(f".{ranks}.toml")


@contextmanager
def placed(ranks: int, network: bool) -> Iterator[Place]:
    """Prepares the ranks' environments: on this host, or each in a network namespace."""
    if not network:
        yield None, None
        return
    with hosts(ranks) as found:
        yield [told for _, told in found], [prefix for prefix, _ in found]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser("python -m tests.bench.hosts", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--ranks", type=int, default=2, help="to compare with one (default: 2)")
    parser.add_argument("--network", action="store_true", help="run each in a network namespace")
    parser.add_argument("--quantize", default="8da4w", help="(default: 8da4w)")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    checkpoint, shards = FOLDER / "110m.bin", FOLDER / f"110m-{options.quantize}.shards"
    if not checkpoint.exists():
        torch.manual_seed(0)
        model = Llama(SHAPE).requires_grad_(False)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
        write_llama2c(model, checkpoint, version=1)
    export(checkpoint, None, shards, SHAPE.context, "--quantize", options.quantize, "--shards", str(SHAPE.n_layers))
    prompts = FOLDER / "texts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_ids": [5 + text] * 4}) + "\n" for text in range(TEXTS)))
    print(f"| round | one rank | {options.ranks} ranks | ratio | planned | planned to measured |")
    print("|---|---|---|---|---|---|")
    ratios, shares = list[float](), list[float]()
    with placed(options.ranks, options.network) as place:
        for number in range(1, options.rounds + 1):
            expected = planned(shards, options.ranks, place) / planned(shards, 1, (None, None))
            one, several = rate(shards, prompts, 1, (None, None)), rate(shards, prompts, options.ranks, place)
            ratios.append(several / one)
            shares.append(expected / ratios[-1])
            row = f"{one:.1f} | {several:.1f} | {ratios[-1]:.2f} | {expected:.2f} | {shares[-1]:.2f}"
            print(f"| {number} | {row} |", flush=True)
    print(f"median ratio {statistics.median(ratios):.2f}, planned to measured {statistics.median(shares):.2f}")


if __name__ == "__main__":
    main()
