"""Tests the sampling options that a checkpoint recommends: they are read, stored in the file, and are the chat's
defaults.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from export import inspect
from export.checkpoints.checkpoint import recommended
from export.checkpoints.layouts import BUILT_IN
from export.llama import export_llama
from export.planning.plan import ExportOptions
from model.errors import InputError
from runtime import chat as command
from runtime.engine.program import Program
from tests.runtime.test_chat import typed


def test_recommended_sampling_options_are_the_defaults_of_chats(
    runner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(BUILT_IN, tmp_path / "model"))
    recommendation = {"temperature": 0.75, "top_k": 7, "top_p": 0.75, "repetition_penalty": 1.25}
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, **recommendation}))
    options = ExportOptions(checkpoint=folder, max_seq_len=512, chat_template="llama2", output=tmp_path / "x.pte")
    file = export_llama(options)
    assert Program(file).metadata.sampling == recommendation
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in recommendation.items()]
    common = [str(file), "--seed", "3", "--max-new-tokens", "20"]

    def answer(flags: list[str]) -> str:
        typed("Once upon a time\n", monkeypatch)
        command.main([*common, *flags])
        return capsys.readouterr().out

    plain, explicit, greedy = answer([]), answer(flags), answer(["--temperature", "0", "--repetition-penalty", "1"])
    assert plain == explicit != greedy
    for asked, expected in (([], plain), (["--temperature", "0", "--repetition-penalty", "1"], greedy)):
        done = subprocess.run(
            [runner, *common, "--chat", *asked], input="Once upon a time\n", capture_output=True, text=True, check=True
        )
        assert done.stdout == expected
    inspect.main([str(file)])
    assert "sampling     repetition_penalty 1.25, temperature 0.75, top_k 7, top_p 0.75" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}),
        ({"temperature": None, "top_k": 20.0}, {"top_k": 20}),
        ({"temperature": "warm"}, "sets temperature to 'warm', which is invalid"),
        ({"top_k": 2.5}, "sets top_k to 2.5"),
    ],
)
def test_a_generation_config_is_read(settings: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            recommended(settings, tmp_path)
    else:
        assert recommended(settings, tmp_path) == expected
