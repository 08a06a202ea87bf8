import struct
from pathlib import Path

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from export.lowering.trace import GraphOptions, signatures
from export.planning.memory import matrix_bytes
from export.weights.scheme import SCHEMES
from model.config import ModelConfig, RopeScaling
from model.errors import InputError
from model.rotary import inverse_frequencies
from preproc import rope
from runtime.engine.program import read_metadata
from runtime.pte.metadata import (
    FIELDS,
    FORMAT_VERSION,
    NO_TOKENIZER,
    Metadata,
    Requirements,
    from_constants,
    to_constants,
)
from runtime.pte.trailer import Trailer, check_file
from tests.conftest import TOY

SCALED = ModelConfig(32, 2, 4, 2, 8, 48, 64, 48, rope_scaling=RopeScaling("llama3", 8.0, 16))


def metadata(config: ModelConfig, **changes: object) -> Metadata:
    cos, sin = rope.tables(config, 48)
    fields = {
        "config": config,
        "matrix_bytes": 12345,
        "activation_bytes": 678,
        "max_seq_len": 48,
        "batch_size": 1,
        "bos_id": 1,
        "stop_ids": (2, 7),
        "methods": signatures(config, GraphOptions(48, 7)),
        "requirements": Requirements("1.5.1", ("XnnpackBackend",), ("aten::embedding.out",)),
        "provenance": {"options": {"dtype": "fp32"}},
        "rope_cos": cos,
        "rope_sin": sin,
        "alibi_slopes": torch.zeros(config.n_heads),
        "rope_inverse_frequencies": inverse_frequencies(config, config.context),
        "tokenizer_kind": "sentencepiece",
        "tokenizer": b"\n\x00\xff",
        "chat_template": '{"opening": "<s>"}',
        "sampling": {"temperature": 0.25, "top_k": 40},
    }
    return Metadata(**(fields | changes))  # type: ignore[arg-type]


def test_a_tensors_role_and_layer_follow_from_its_name() -> None:
    decode, prefill = metadata(TOY).methods
    assert [(spec.role, spec.layer, spec.rows) for spec in decode.caches] == [
        ("k_cache", 0, "k_rows.0"),
        ("k_cache", 1, "k_rows.1"),
        ("v_cache", 0, "v_rows.0"),
        ("v_cache", 1, "v_rows.1"),
    ]
    assert [spec.name for spec in decode.outputs if spec.is_rows] == [spec.rows for spec in decode.caches]
    others = [spec for spec in (*prefill.inputs, *prefill.outputs) if not spec.is_cache and not spec.is_rows]
    assert {(spec.role, spec.layer) for spec in others} == {(spec.name, None) for spec in others}
    assert "tokens" in {spec.role for spec in others}


def test_a_chunk_is_the_longest_step() -> None:
    assert metadata(TOY).chunk == 7


def through_a_file(value: object) -> list[object]:
    """Returns a constant method's value as ExecuTorch does, with a list as several values."""
    return value if isinstance(value, list) else [value]


@pytest.mark.parametrize(
    "given_metadata",
    [
        metadata(TOY),
        metadata(SCALED),
        metadata(TOY, bos_id=None, stop_ids=(), tokenizer_kind=NO_TOKENIZER, tokenizer=b"", chat_template=""),
    ],
)
def test_metadata_survives_a_round_trip(given_metadata: Metadata) -> None:
    constants = to_constants(given_metadata)
    assert constants.keys() == FIELDS.keys(), "the table lists all that a file carries, and no more"
    found = from_constants(lambda name: through_a_file(constants[name]))
    for name, value in vars(given_metadata).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(found, name), value), name
        else:
            assert getattr(found, name) == value, name


def test_a_files_metadata_is_that_of_its_checkpoint_and_tokenizer(toy_pte: Path) -> None:
    found = read_metadata(toy_pte)
    assert found.config == TOY
    assert found.max_seq_len == TOY.context
    assert found.matrix_bytes == matrix_bytes(TOY, SCHEMES["fp32"])
    assert (found.bos_id, found.stop_ids) == (1, (1, 2))
    assert [method.name for method in found.methods] == ["forward"]
    assert torch.equal(found.rope_cos, rope.tables(TOY, TOY.context)[0])
    assert found.tokenizer_kind == "sentencepiece"


@pytest.mark.parametrize(("name", "value"), [("get_config", "{}"), ("get_methods", "[{}]"), ("get_requirements", "x")])
def test_malformed_metadata_is_refused(name: str, value: str) -> None:
    constants = to_constants(metadata(TOY)) | {name: value}
    with pytest.raises(InputError, match="metadata cannot be read"):
        from_constants(lambda name: through_a_file(constants[name]))


def write(path: Path, program: bytes, version: int = FORMAT_VERSION) -> bytes:
    """Writes a file whose trailer is made by hand from the documented layout."""
    digest = xxhash.xxh3_64(program).intdigest()
    content = program + b"llamapte" + struct.pack("<IIQQ", version, 0, len(program), digest)
    path.write_bytes(content)
    return content


PROGRAM = b"\x10\x00\x00\x00ET12" + bytes(range(256)) * 4


def test_the_trailer_is_as_documented(tmp_path: Path) -> None:
    trailer = Trailer()
    trailer.add(PROGRAM[:100])
    trailer.add(PROGRAM[100:])
    assert write(tmp_path / "a.pte", PROGRAM) == PROGRAM + trailer.pack()
    check_file(tmp_path / "a.pte")


@given(st.data())
def test_any_changed_or_missing_bytes_are_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damage") / "a.pte"
    content = bytearray(write(path, PROGRAM))
    if data.draw(st.booleans(), label="cut"):
        damaged = bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    else:
        place = data.draw(st.integers(0, len(content) - 1).filter(lambda i: not 12 <= i - len(PROGRAM) < 16))
        content[place] ^= data.draw(st.integers(1, 255))
        damaged = bytes(content)
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"a\.pte") as caught:
        check_file(path)
    assert "\n" not in str(caught.value)


def test_newer_versions_foreign_files_and_absent_ones_have_their_own_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.pte"
    write(path, PROGRAM, version=FORMAT_VERSION + 1)
    with pytest.raises(InputError, match=f"format version {FORMAT_VERSION + 1}, newer than this version's"):
        check_file(path)
    write(path, PROGRAM, version=FORMAT_VERSION - 1)
    with pytest.raises(InputError, match=f"format version {FORMAT_VERSION - 1}, but this version reads"):
        check_file(path)
    path.write_bytes(PROGRAM)
    with pytest.raises(InputError, match="truncated or was not made by llama-pte"):
        check_file(path)
    path.write_bytes(b"hello")
    with pytest.raises(InputError, match=r"is not a \.pte file"):
        check_file(path)
    with pytest.raises(InputError, match="is not a file"):
        check_file(tmp_path / "absent.pte")


def test_without_the_checksum_only_length_and_version_are_checked(tmp_path: Path) -> None:
    content = bytearray(write(tmp_path / "a.pte", PROGRAM))
    content[50] ^= 1
    (tmp_path / "a.pte").write_bytes(content)
    check_file(tmp_path / "a.pte", checksum=False)
