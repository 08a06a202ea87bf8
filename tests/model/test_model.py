"""Tests the model against transformers as an independent implementation, in one pass and with caches."""

from dataclasses import replace
from itertools import starmap
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from export.checkpoints.layouts import open_checkpoint
from export.quality.eager import reference
from model.model import BlockCache
from preproc import mask, rope
from tests.conftest import TOY, random_model
from tests.preproc.test_rope import LLAMA3

VARIANTS = {
    "gqa, untied, llama3 scaling, wide heads": {
        "num_key_value_heads": 2,
        "head_dim": 24,
        "tie_word_embeddings": False,
        "rope_parameters": LLAMA3 | {"rope_theta": 500000.0},
    },
    "mha, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "mqa, untied": {"num_key_value_heads": 1, "tie_word_embeddings": False},
}
"""transformers' names of the settings in which Llama models differ."""


def hugging_face_llama(variant: str, folder: Path) -> LlamaForCausalLM:
    """Saves a random model of one variant in `folder`, with weights large enough for logits to differ by more than
    rounding.
    """
    torch.manual_seed(1)
    settings = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}} | VARIANTS[variant]
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        **settings,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    theirs = hugging_face_llama(variant, tmp_path)
    tokens = torch.randint(200, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits[0]
    (ours,) = reference(open_checkpoint(tmp_path).build(), tokens.tolist())
    assert expected.abs().max() > 1
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_a_batch_with_cached_rows_gives_each_sequence_its_own_logits() -> None:
    """Runs two sequences at different positions in one step and compares with each alone in one pass."""
    model, capacity, generator = random_model(TOY), 16, torch.Generator().manual_seed(0)
    positions, length = (3, 9), 4
    texts = [torch.randint(TOY.vocab_size, (p + length,), generator=generator).tolist() for p in positions]
    tables = rope.tables(TOY, capacity)
    caches = [torch.randn(2 * TOY.n_kv_heads, capacity, TOY.head_dim) for _ in range(2 * TOY.n_layers)]
    for row, (position, text) in enumerate(zip(positions, texts, strict=True)):
        cos, sin = rope.slices(tables, 0, position)
        masks = [mask.causal(0, position, 0).unsqueeze(0)] * TOY.n_layers
        done = model(torch.tensor([text[:position]]), (cos, sin), masks, torch.eye(position)[None])
        for cache, rows in zip(caches, done.k_rows + done.v_rows, strict=True):
            cache[row * TOY.n_kv_heads : (row + 1) * TOY.n_kv_heads, :position] = rows
    cos, sin = (torch.cat(parts) for parts in zip(*(rope.slices(tables, p, length) for p in positions), strict=True))
    logits = model(
        torch.tensor([text[-length:] for text in texts]),
        (cos, sin),
        [torch.stack([mask.causal(p, length, capacity) for p in positions])] * TOY.n_layers,
        torch.eye(length).repeat(2, 1, 1),
        list(starmap(BlockCache, zip(caches[: TOY.n_layers], caches[TOY.n_layers :], strict=True))),
    ).logits.flatten(0, 1)
    expected = torch.cat(reference(model, texts, [length] * len(texts)))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_select_names_the_rows_whose_logits_are_returned() -> None:
    model = random_model(replace(TOY, n_layers=1))
    tokens = [5, 6, 7, 8]
    cos, sin = rope.slices(rope.tables(TOY, 4), 0, 4)
    select = torch.tensor([[[0.0, 0, 0, 1], [0, 1, 0, 0]]])
    step = model(torch.tensor([tokens]), (cos, sin), [mask.causal(0, 4, 0).unsqueeze(0)], select)
    torch.testing.assert_close(step.logits[0], reference(model, [tokens])[0][[3, 1]])
