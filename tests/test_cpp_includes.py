"""The C++ runner's rooms build on each other one way, as the Python packages do (pyproject.toml, importlinter)."""

import re
from pathlib import Path

CPP = Path(__file__).parents[1] / "cpp_runner"
ROOMS = ["support", "pte", "attention", "linear", "preproc", "tokenizer", "engine", "text", "cli"]
HEADER_ONLY = {"result": "support", "measure": "support", "steps": "engine"}


def room(file: str) -> int:
    """How high a file stands: a public header where its source does, and the C interface on top of all."""
    name = Path(file).stem
    sources = [path.parent.name for path in CPP.glob(f"src/*/{name}.cpp")] if "llama_runner/" in file else []
    folder = HEADER_ONLY.get(name) or next(iter(sources), Path(file).parent.name)
    return ROOMS.index(folder) if folder in ROOMS else len(ROOMS)


def test_includes_go_down() -> None:
    files = [path for path in CPP.rglob("*") if path.suffix in (".cpp", ".h", ".inc")]
    assert len(files) > 80
    for path in files:
        file = str(path.relative_to(CPP))
        for included in re.findall(r'^#include "(.*)"', path.read_text(), re.MULTILINE):
            assert room(included) <= room(file), f"{file} includes {included}"
