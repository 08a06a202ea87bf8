"""Exports the built-in model and continues a prompt, all from Python.

python -m examples.library [FOLDER]
"""

import sys
from pathlib import Path

from export.llama import export_llama
from export.planning.plan import ExportOptions
from runtime.engine.program import Program
from runtime.engine.session import Session
from runtime.text.generation import GenerationOptions, generate
from runtime.text.prompts import prompt_ids
from runtime.text.sampler import Rng, SamplingOptions


def main(folder: Path) -> None:
    """Exports the model to the folder, then prints two continuations of one prompt, which is run only once."""
    path = export_llama(ExportOptions(max_seq_len=256, quantize="8da8w", output=folder / "tiny.pte"))
    program = Program(path)
    options = GenerationOptions(SamplingOptions(temperature=0.8), max_new_tokens=40, stop_ids=program.metadata.stop_ids)
    session, prompt = Session(program), prompt_ids(program, "Once upon a time")
    session.prefill(prompt)
    for seed in (1, 2):
        steps = generate(session.fork(), prompt, options, Rng(seed), program.tokenizer)
        print("".join(step.text for step in steps))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path())
