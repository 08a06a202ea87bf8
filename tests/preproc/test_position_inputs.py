import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from preproc.position_inputs import PositionInputs, Positions, names
from tests.support.kinds import CHUNK, CONTEXT, KINDS, PLAIN, WINDOW

MOVES = st.lists(st.integers(0, CONTEXT - 1), max_size=6)


def slots_of(config: ModelConfig, mask: str) -> int:
    """Returns the number of slots in the caches that a mask belongs to."""
    return min(CONTEXT, config.sliding_window or CONTEXT) if mask == "local_mask" else CONTEXT


def widths_of(config: ModelConfig, length: int) -> dict[str, int]:
    """Returns the last dimension of every input; only the masks' are used."""
    return {name: slots_of(config, name) + length for name in names(config)}


@pytest.mark.parametrize("name", KINDS)
@given(moves=MOVES, length=st.sampled_from([1, CHUNK]))
def test_moved_inputs_equal_new_ones(name: str, moves: list[int], length: int) -> None:
    config = KINDS[name].config
    positions = Positions.of(config, CONTEXT)
    inputs = PositionInputs(positions, widths_of(config, length), length)
    assert list(inputs.tensors) == names(config)
    places = {role: tensor.data_ptr() for role, tensor in inputs.tensors.items()}
    for position in [0, *moves]:
        inputs.move(position, length)
        for role, tensor in inputs.tensors.items():
            assert torch.equal(tensor, positions.make(role, position, length, slots_of(config, role))), role
    assert {role: tensor.data_ptr() for role, tensor in inputs.tensors.items()} == places, "allocated once"


@given(moves=st.lists(st.tuples(st.integers(0, CONTEXT - 1), st.integers(1, CHUNK)), max_size=6))
def test_with_fused_attention_only_the_rows_of_a_step_are_set(moves: list[tuple[int, int]]) -> None:
    positions = Positions.of(PLAIN, CONTEXT)
    inputs = PositionInputs(positions, dict.fromkeys(names(PLAIN, fused=True), 1), CHUNK)
    assert list(inputs.tensors) == ["cos", "sin", "start"]
    for position, length in moves:
        inputs.move(position, length)
        assert inputs.tensors["start"].tolist() == [position]
        for role in ("cos", "sin"):
            assert torch.equal(inputs.tensors[role][:, :length], positions.make(role, position, length, CONTEXT))


def test_without_caches_masks_have_no_columns_for_them() -> None:
    inputs = PositionInputs(Positions.of(WINDOW, CONTEXT), {"local_mask": CONTEXT, "mask": CONTEXT}, CONTEXT)
    assert {tuple(tensor.shape) for tensor in inputs.tensors.values()} == {(1, CONTEXT, CONTEXT)}
    visible = inputs.tensors["local_mask"][0] == 0
    assert visible.sum(-1).tolist() == [min(row + 1, WINDOW.sliding_window) for row in range(CONTEXT)]


def test_a_mask_has_the_methods_width() -> None:
    positions, longer = Positions.of(WINDOW, CONTEXT), WINDOW.sliding_window + 2
    inputs = PositionInputs(positions, {"local_mask": longer + 1}, 1)
    inputs.move(CONTEXT - 3, 1)
    assert torch.equal(inputs.tensors["local_mask"], positions.make("local_mask", CONTEXT - 3, 1, longer))


def test_padding_repeats_the_last_position() -> None:
    positions = Positions.of(PLAIN, CONTEXT)
    assert positions.make("positions", CONTEXT - 2, 4, 0).tolist() == [[CONTEXT - 2] + [CONTEXT - 1] * 3]
    sin = positions.make("sin", CONTEXT - 2, 4, 0)
    assert sin.shape == (1, 4, PLAIN.head_dim // 2)
    assert torch.equal(sin[0, 1:], positions.sin[-1:].expand(3, -1))
