import pytest
import torch

from export.weights import rows


def test_parts_of_whole_rows_equal_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_ELEMENTS_AT_ONCE", 3 * 64)
    matrix = torch.randn(40, 64)
    assert [len(part) for part in rows.row_chunks(matrix)] == [3] * 13 + [1]
    scales = torch.rand(40, 2)
    assert [len(part) for part in rows.row_chunks(scales, like=matrix)] == [3] * 13 + [1]
    doubled, sums = rows.by_rows(matrix, lambda part: [part * 2, part.sum(1)])
    assert torch.equal(doubled, matrix * 2)
    torch.testing.assert_close(sums, matrix.sum(1))
