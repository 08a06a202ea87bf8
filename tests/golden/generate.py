"""Makes the golden files that Python and C++ are both tested against. Run it again when the built-in model changes.

python -m tests.golden.generate
"""

import json
from pathlib import Path
from typing import Any

import torch

from export.llama import export_llama
from export.plan import ExportOptions
from model.checkpoint import BUILT_IN
from runtime.generate import GenerationOptions, generate, prompt_ids
from runtime.program import Program
from runtime.sampler import Rng, SamplingOptions, sample
from runtime.session import Session

GOLDEN = Path(__file__).parent
MODELS = GOLDEN.parent.parent / "build" / "models"
STORIES = GOLDEN.parent.parent.parent / "shared" / "data" / "stories260K"

OPTIONS = [
    SamplingOptions(),
    SamplingOptions(temperature=1.0),
    SamplingOptions(temperature=0.8, top_p=0.9),
    SamplingOptions(temperature=0.7, top_k=5),
    SamplingOptions(temperature=1.3, top_k=12, top_p=0.5),
    SamplingOptions(temperature=0.01),
    SamplingOptions(temperature=100.0, top_p=0.999),
    SamplingOptions(temperature=1.0, top_k=1),
    SamplingOptions(temperature=1.0, top_k=1000, top_p=1e-9),
]
DRAWS = 12
RUNS = [
    ("", SamplingOptions(), 0, 200),
    ("", SamplingOptions(temperature=0.8), 7, 120),
    ("Once upon a time, there was a big red dog", SamplingOptions(temperature=0.8, top_p=0.9), 2**63, 80),
    ("The \N{SNOWMAN} said: \u65e5\u672c", SamplingOptions(temperature=1.2, top_k=20), 3, 60),
    ("A long way. " * 20, SamplingOptions(), 0, 40),
]


def _logits() -> list[list[float]]:
    """Rows of float32: of order 1, of order 10, with ties, all equal, with hidden tokens, with a single one left."""
    generator = torch.Generator().manual_seed(1)
    plain = torch.randn(64, generator=generator)
    ties = torch.randint(0, 4, (40,), generator=generator).float()
    hidden = torch.where(torch.rand(32, generator=generator) < 0.5, torch.tensor(-1e9), plain[:32])
    single = torch.full((16,), -torch.finfo(torch.float32).max)
    single[9] = 0
    rows = [plain, 10 * plain, ties, torch.zeros(7), hidden, single, torch.tensor([2.5])]
    return [row.tolist() for row in rows]


def sampler() -> dict[str, Any]:
    """Coins of the generator, and tokens drawn one after the other from one row of logits."""
    seeds = [0, 1, 7, 2**32, 2**63, 2**64 - 1]
    coins = []
    for seed in seeds:
        rng = Rng(seed)
        coins.append({"seed": seed, "values": [rng.coin() for _ in range(4)]})
    cases = []
    for number, logits in enumerate(_logits()):
        for options in OPTIONS:
            rng = Rng(number)
            tokens = [sample(torch.tensor(logits), options, rng) for _ in range(DRAWS)]
            cases.append({"logits": number, "seed": number, "tokens": tokens, **vars(options)})
    return {"coins": coins, "logits": _logits(), "cases": cases}


def generation(path: Path) -> dict[str, Any]:
    """What follows some prompts, ids and text, and the checkpoint that says so."""
    program = Program(path)
    runs = []
    for prompt, sampling, seed, length in RUNS:
        ids = prompt_ids(program, prompt)
        options = GenerationOptions(sampling, length, program.metadata.stop_ids)
        steps = list(generate(Session(program), ids, options, Rng(seed), program.tokenizer))
        run = {"prompt": prompt, "prompt_ids": ids, "seed": seed, "max_new_tokens": length, **vars(sampling)}
        runs.append(run | {"ids": [step.token for step in steps], "text": "".join(step.text for step in steps)})
    return {"checkpoint": program.metadata.provenance["checkpoint"], "runs": runs}


def write(name: str, content: dict[str, Any]) -> None:
    """One line for each entry, so that changes show."""
    parts = []
    for key, value in content.items():
        items = ",\n".join(json.dumps(item) for item in value) if isinstance(value, list) else None
        parts.append(f"{json.dumps(key)}: " + (json.dumps(value) if items is None else f"[\n{items}\n]"))
    (GOLDEN / name).write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main() -> None:
    """Writes all golden files; stories260K's only where ../shared/data has it."""
    write("sampler.json", sampler())
    tiny = ExportOptions(checkpoint=BUILT_IN, max_seq_len=512, output=MODELS / "tiny.pte")
    write("tiny.json", generation(export_llama(tiny)))
    if STORIES.is_dir():
        stories = ExportOptions(
            checkpoint=STORIES / "stories260K.bin",
            tokenizer=STORIES / "tok512.model",
            max_seq_len=512,
            output=MODELS / "stories260K.pte",
        )
        write("stories260K.json", generation(export_llama(stories)))


if __name__ == "__main__":
    main()
