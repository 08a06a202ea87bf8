from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import InputError
from runtime.distributed.token_log import TokenLog

RUN = {"model": "a", "prompts": "b", "options": ["c", 3]}
TOKENS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 99_999)), max_size=20)


@settings(max_examples=50)
@given(tokens=TOKENS, more=TOKENS, cut=st.integers(0, 400))
def test_a_truncated_journal_keeps_its_complete_lines(
    tokens: list[tuple[int, int]], more: list[tuple[int, int]], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("journal") / "run"
    token_log = TokenLog(path, RUN)
    for number, token in tokens:
        token_log.add(number, token)
    content = path.read_bytes()[: cut + 1]
    path.write_bytes(content)
    whole = tokens[: max(content.count(b"\n") - 1, 0)]
    again = TokenLog(path, RUN)
    assert again.tokens == by_text(whole)
    for number, token in more:
        again.add(number, token)
    assert TokenLog(path, RUN).tokens == by_text([*whole, *more])


def by_text(tokens: list[tuple[int, int]]) -> dict[int, list[int]]:
    found = dict[int, list[int]]()
    for number, token in tokens:
        found.setdefault(number, []).append(token)
    return found


def test_foreign_files_and_other_runs_journals_stay_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for content in (b"a text of mine", b"a text of mine\nwith lines", b"\n"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="run belongs to a run with another model, prompts or options"):
            TokenLog(path, RUN)
        assert path.read_bytes() == content
    path.unlink()
    TokenLog(path, RUN).add(0, 1)
    with pytest.raises(InputError, match="belongs to a run with another model"):
        TokenLog(path, RUN | {"model": "other"})
    with pytest.raises(InputError, match=r"cannot be used \(Is a directory\); give another file"):
        TokenLog(tmp_path, RUN)


def test_without_a_path_nothing_is_kept() -> None:
    token_log = TokenLog(None, RUN)
    token_log.add(0, 1)
    assert token_log.tokens == {}
