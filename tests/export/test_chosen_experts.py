"""Mixtures of experts with weights in blocks, as a whole: a model that transformers made, exported, run and counted."""

import json
import re
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from executorch.exir import schema
from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from torch import nn

from export.checkpoints.checkpoint import renamed
from export.checkpoints.families import FAMILIES
from export.llama import ExportOptions
from export.planning.plan import plan
from export.quality.eager import reference
from export.weights.formats.blocks import Blocks
from export.weights.formats.chosen_experts import ChosenExperts, choose_experts
from export.weights.scheme import SCHEMES, matrix_sizes
from export.weights.source import WeightSource
from model.errors import InputError
from model.model import Experts
from runtime.engine.program import Program
from runtime.engine.session import Session
from runtime.text.generation import GenerationOptions, generate
from runtime.text.sampler import Rng
from tests.conftest import MODELS, TOY, exported, random_model
from tests.support.families import Case, hugging_face_model

PROMPT = list(range(3, 23))
CASE = Case(
    "MixtralForCausalLM",
    {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2, "num_hidden_layers": 2}
    | {"num_local_experts": 8, "num_experts_per_tok": 2},
)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> ExportOptions:
    """Returns options to export a Mixtral of 8 experts, 2 chosen per token, in chunks that its prompt does not fill."""
    folder = tmp_path_factory.mktemp("mixtral")
    hugging_face_model(CASE).save_pretrained(folder)
    return ExportOptions(
        checkpoint=folder,
        tokenizer=Path("none"),
        max_seq_len=64,
        prefill_chunk=7,
        quantize="q4_0",
        output=MODELS / "Mixtral-q4_0.pte",
    )


@pytest.fixture(scope="module")
def pte(options: ExportOptions) -> Path:
    return exported(options)


def test_python_and_cpp_give_the_eager_models_tokens(options: ExportOptions, pte: Path, runner: Path) -> None:
    program = Program(pte)
    assert program.metadata.methods[0].is_fused
    assert "llama_pte::expert_linear.out" in program.metadata.requirements.operators
    ids = [step.token for step in generate(Session(program), PROMPT, GenerationOptions(max_new_tokens=30), Rng(0))]
    right = reference(plan(options).source.streamed(), [PROMPT + ids])[0][len(PROMPT) - 1 :]
    assert right.argmax(-1).tolist()[:-1] == ids
    assert len(set(ids)) > 5
    session = Session(program)
    found = [session.prefill(PROMPT), *(session.decode(token) for token in ids)]
    torch.testing.assert_close(torch.stack(found), right, atol=1e-3, rtol=0)
    command = [runner, pte, "--format", "json", "--max-new-tokens", "30", "--prompt-ids", ",".join(map(str, PROMPT))]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["token_ids"][-30:] == ids


@torch.no_grad()
def test_logits_are_near_those_of_transformers_with_the_same_weights(
    options: ExportOptions, pte: Path, tmp_path: Path
) -> None:
    source, names = plan(options).source, FAMILIES["MixtralForCausalLM"].storage.names
    state = load_file(options.checkpoint / "model.safetensors")
    for name in source.matrices:
        form = source.format(name)
        if isinstance(form, Blocks):
            numbers = dequantize(source.stored(name).numpy(), GGMLQuantizationType[form.name])
            state[renamed(name, names)] = torch.from_numpy(numbers.copy())
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((options.checkpoint / "config.json").read_bytes())
    theirs = transformers.MixtralForCausalLM.from_pretrained(tmp_path)
    right = theirs(torch.tensor([PROMPT]), use_cache=False).logits[0]
    session = Session(Program(pte))
    found = torch.stack([session.prefill(PROMPT[:1]), *(session.decode(token) for token in PROMPT[1:])])
    errors = (found - right).norm(dim=-1) / right.norm(dim=-1)
    assert errors.median() < 0.1, "inputs of layers are rounded to 8 bits"
    assert errors.max() < 0.5, "a rounded input may choose another expert, where two have nearly equal shares"


@pytest.mark.parametrize("gated", [True, False])
def test_the_chosen_experts_are_those_that_the_model_weights(gated: bool) -> None:
    config = replace(TOY, dim=64, head_dim=16, hidden_dim=96, n_experts=5, n_chosen_experts=3, gated=gated)
    model = random_model(config)
    source = WeightSource(config, model.state_dict(), SCHEMES["q4_0"])
    chosen = source.piece("layers.0").get_submodule("feed_forward")
    assert isinstance(chosen, ChosenExperts)
    dense = Experts(config)
    dense.router, dense.experts = chosen.router, chosen.experts
    x = torch.randn(2, 9, 64)
    torch.testing.assert_close(chosen(x), dense(x), atol=1e-5, rtol=1e-5)


def test_other_formats_compute_all_experts() -> None:
    config = replace(TOY, n_experts=4, n_chosen_experts=2)
    for scheme in ("fp32", "8da8w"):
        piece = WeightSource(config, random_model(config).state_dict(), SCHEMES[scheme]).piece("layers.0")
        assert isinstance(piece.get_submodule("feed_forward"), Experts)
    untouched = nn.Sequential(nn.Linear(2, 2))
    choose_experts(untouched)
    assert isinstance(untouched[0], nn.Linear)


def _program(path: Path) -> schema.Program:
    with path.open("rb") as file:
        (size,) = struct.unpack_from("<Q", file.read(24), 16)
        file.seek(0)
        return _flatbuffer_to_program(file.read(size))


def read_bytes(program: schema.Program, chosen: int) -> Iterator[int]:
    """Yields the bytes of matrices that each step of a program reads at most: all of an operator's matrix, as many of
    its experts' matrices as a token chooses, and what backends name.
    """
    (plan,) = (plan for plan in program.execution_plan if plan.name == "forward")

    def size(index: int) -> int:
        value = plan.values[index].val
        is_constant = isinstance(value, schema.Tensor) and value.data_buffer_idx
        return value.sizes[0] if is_constant and len(value.sizes) == 1 else 0

    for instruction in plan.chains[0].instructions:
        call = instruction.instr_args
        if not isinstance(call, schema.KernelCall):
            continue
        operator = plan.operators[call.op_index].name
        if linear := re.fullmatch("llama_pte::linear([23]?)", operator):
            yield from (size(call.args[1 + 4 * matrix]) for matrix in range(int(linear[1] or 1)))
        elif operator == "llama_pte::expert_linear":
            sizes = [size(index) for index in plan.values[call.args[1]].val.items]
            assert min(sizes) == max(sizes) > 0
            yield chosen * sizes[0]


def test_a_decoded_token_reads_no_more_than_its_experts(pte: Path) -> None:
    metadata = Program(pte).metadata
    config = metadata.config
    sizes = matrix_sizes(config, SCHEMES["q4_0"])
    routers = sum(size for name, size in sizes.items() if ".router." in name)
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    active = experts * config.n_chosen_experts // config.n_experts
    others = sum(sizes.values()) - routers - experts
    found = sum(read_bytes(_program(pte), config.n_chosen_experts))
    assert active + others <= found + routers <= 1.05 * (active + others + routers)
    assert found < sum(sizes.values()) / 2


def test_fused_attention_needs_chosen_experts(options: ExportOptions) -> None:
    assert plan(options).graph.attention == "fused"
    assert plan(replace(options, quantize="8da8w")).graph.attention == "aten"
    with pytest.raises(InputError, match="--attention fused needs one of GGUF's types for a mixture of experts"):
        plan(replace(options, quantize="8da8w", attention="fused"))
