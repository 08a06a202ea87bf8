"""Checks that the folders of the C++ runner include each other in one direction only, as import-linter checks for the
Python packages.
"""

import re
from pathlib import Path

CPP = Path(__file__).parents[1] / "cpp_runner"
LAYERS = ["support", "pte", "attention", "linear", "preproc", "tokenizer", "engine", "text", "cli"]
HEADER_ONLY = {"result": "support", "measure": "support", "steps": "engine"}


def layer_of(file: str) -> int:
    """Returns a file's layer as a number. A public header has the layer of its source file; the C interface is the
    highest.
    """
    name = Path(file).stem
    sources = [path.parent.name for path in CPP.glob(f"src/*/{name}.cpp")] if "llama_runner/" in file else []
    folder = HEADER_ONLY.get(name) or next(iter(sources), Path(file).parent.name)
    return LAYERS.index(folder) if folder in LAYERS else len(LAYERS)


def test_includes_go_down() -> None:
    files = [path for path in CPP.rglob("*") if path.suffix in (".cpp", ".h", ".inc")]
    assert len(files) > 80
    for path in files:
        file = str(path.relative_to(CPP))
        for included in re.findall(r'^#include "(.*)"', path.read_text(), re.MULTILINE):
            assert layer_of(included) <= layer_of(file), f"{file} includes {included}"
