import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.fused_attention import FusedLlama
from model.kv_row_format import KV_DTYPES, decode, encode
from model.model import BlockCache
from preproc.mask import held
from preproc.position_inputs import Positions, mask_name, names
from tests.support.kinds import CONTEXT, KINDS, Kind

CACHED = {name: kind for name, kind in KINDS.items() if kind.options.kv_cache and kind.kv_dtype == "float32"}

OPERATOR = (Path(__file__).parents[2] / "cpp_runner" / "src" / "attention" / "operator.cpp").read_text()


def test_the_devices_operator_has_the_same_schema() -> None:
    schema = torch.ops.llama_pte.attention.out._schema
    comment = " ".join(re.findall(r"^// ?(.*)", OPERATOR.partition("#include")[0], re.MULTILINE))
    (said,) = re.findall(r"attention(\(.* -> \(.*\))", re.sub(r"\s+", " ", comment))
    assert f'kName = "{schema.name}.{schema.overload_name}";' in OPERATOR
    assert f"{schema.name}.{schema.overload_name}{said}" == str(schema)
    (members,) = re.findall(r"enum Argument : size_t \{(.*?)\}", OPERATOR, re.DOTALL)
    *places, count = (re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower() for name in re.findall(r"k(\w+),", members))
    assert (places, count) == ([argument.name for argument in schema.arguments], "arguments")


def random_caches(kind: Kind, position: int) -> list[BlockCache]:
    """Returns caches of a text with `position` tokens. Empty slots hold a large value, which must not be read."""
    config = kind.config
    caches = list[BlockCache]()
    for layer in range(config.n_layers):
        slots = min(CONTEXT, config.window(layer) or CONTEXT)
        empty = (held(position, slots) < 0).view(1, slots, 1)
        shape = (config.n_kv_heads, slots, config.head_dim)
        caches.append(BlockCache(*(torch.where(empty, 1e4, torch.randn(shape)) for _ in "kv")))
    return caches


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize(("position", "length"), [(0, 1), (0, 7), (3, 5), (20, 1), (33, 7)])
def test_a_fused_model_equals_the_plain_one(name: str, position: int, length: int) -> None:
    torch.manual_seed(0)
    kind, config = KINDS[name], KINDS[name].config
    positions, caches = Positions.of(config, CONTEXT), random_caches(kind, position)

    def made(role: str, capacity: int = 0) -> Tensor:
        return positions.make(role, position, length, capacity)

    tokens, select = torch.randint(config.vocab_size, (1, length)), torch.eye(length)[None]
    angles = (made("cos"), made("sin")) if config.positions == "rope" else None
    ids = made("positions") if "positions" in names(config) else None
    masks = [made(mask_name(config, layer), cache.k.shape[1]) for layer, cache in enumerate(caches)]
    plain = kind.model(tokens, angles, masks, select, caches, ids)
    fused = FusedLlama(kind.model)(tokens, angles, made("start"), select, caches, ids)
    torch.testing.assert_close(fused, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", KV_DTYPES.values())
def test_results_do_not_depend_on_the_lengths_of_steps(dtype: str) -> None:
    """New rows must be rounded as in the cache before they are attended to."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, width) for width in (48, 16, 16))
    none = encode(torch.zeros(4, 12, 8), dtype)

    def run(first: int, last: int, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = slice(first, last)
        start = torch.tensor([first, first])
        return torch.ops.llama_pte.attention(
            q[:, rows], k[:, rows], v[:, rows], None, None, None, k_cache, v_cache, start, 0.3, 0.0, 0
        )

    whole, k_rows, v_rows = run(0, 9, none, none)
    k_cache, v_cache = none.clone(), none.clone()
    k_cache[:, :5], v_cache[:, :5] = k_rows[:, :5], v_rows[:, :5]
    later, later_k, _ = run(5, 9, k_cache, v_cache)
    torch.testing.assert_close(later, whole[:, 5:])
    assert torch.equal(later_k, k_rows[:, 5:])
    assert k_rows.dtype == getattr(torch, dtype)


def test_sequences_of_a_batch_have_positions_of_their_own() -> None:
    torch.manual_seed(0)
    q, k, v, cache = torch.randn(2, 3, 32), torch.randn(2, 3, 16), torch.randn(2, 3, 16), torch.randn(4, 20, 8)

    def run(sequences: slice, start: list[int]) -> Tensor:
        caches = cache.view(2, 2, 20, 8)[sequences].flatten(0, 1)
        return torch.ops.llama_pte.attention(
            *(x[sequences] for x in (q, k, v)), None, None, None, caches, caches, torch.tensor(start), 0.3, 0.0, 4
        )[0]

    both = run(slice(None), [5, 17])
    torch.testing.assert_close(both, torch.cat((run(slice(0, 1), [5]), run(slice(1, 2), [17]))))


def test_int8_rows_are_off_by_at_most_a_256th_of_their_largest() -> None:
    rows = torch.randn(3, 5, 16) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1)
    rows[1, 2] = 0
    stored = encode(rows, "int8")
    assert (stored.dtype, stored.shape) == (torch.int8, (3, 5, 20))
    error = (decode(stored) - rows).abs().amax(-1)
    assert bool((error <= rows.abs().amax(-1) / 253).all())
    assert torch.equal(encode(decode(stored), "int8")[..., :16], stored[..., :16])
