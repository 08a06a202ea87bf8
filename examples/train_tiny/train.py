"""Trains the built-in model: a small Llama on short stories, written as a Hugging Face folder.

Text becomes stories, stories become BOS + tokens + EOS, and rows of whole stories become the batches. The checkpoint
kept is the one with the lowest validation loss.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import safetensors.torch
import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor

from examples.train_tiny.stories import BOS, EOS, encode, pack, read_corpus, train_tokenizer
from export.checkpoints.checkpoint import renamed
from export.checkpoints.layouts import open_checkpoint
from export.checkpoints.weight_names import HUGGING_FACE_NAMES
from model.config import ModelConfig
from model.errors import InputError
from model.model import Block, BlockCache, Llama
from model.norm import Norm
from preproc import mask, rope

COPY_LIMIT = 30
"""Number of consecutive tokens in common with the training text that makes a sample a copy."""
EXAMPLE = """example:
  python -m examples.train_tiny.train --data train-a.txt train-b.txt --valid valid.txt --fast
  python -m examples.train_tiny.train --data train-a.txt train-b.txt --valid valid.txt --evaluate
"""


@dataclass(frozen=True)
class TrainOptions:
    """Options of the training.

    Attributes:
        steps: optimiser steps.
        batch: number of rows of `context` tokens in a step; `micro` rows are run at a time.
        learning_rate: peak learning rate, reached after `warmup` steps, then a cosine down to a twentieth of it.
        dropout: share of the embedding's and of each block's outputs that is zeroed.
        every: number of steps between two reports, each with a validation loss.
        fast: whether to compile the model and multiply matrices in bfloat16.
    """

    steps: int
    batch: int = 8
    micro: int = 2
    learning_rate: float = 2e-3
    warmup: int = 200
    weight_decay: float = 0.1
    dropout: float = 0.1
    every: int = 200
    seed: int = 0
    fast: bool = False


@dataclass(frozen=True)
class Preset:
    """A model's dimensions and the training options for it."""

    config: ModelConfig
    options: TrainOptions


VOCABULARY = 2048
VALID_SHARE = 6
"""Step between the validation stories that are read during training: every sixth."""
PRESETS = {
    "tiny": Preset(
        ModelConfig(192, 5, 6, 3, 32, 512, VOCABULARY, 512, tied=True),
        TrainOptions(steps=4000, dropout=0.15),
    ),
    "small": Preset(
        ModelConfig(320, 8, 10, 5, 32, 864, VOCABULARY, 512, tied=True),
        TrainOptions(steps=1200, learning_rate=1.5e-3, warmup=100, dropout=0.1, every=100),
    ),
}


class Positions(NamedTuple):
    """The model's inputs for positions 0 .. L-1: cos and sin [L, Dh/2], mask [L, L]."""

    cos: Tensor
    sin: Tensor
    mask: Tensor

    @classmethod
    def of(cls, config: ModelConfig) -> "Positions":
        return cls(*rope.tables(config, config.context), mask.causal(0, config.context, 0))

    def batch(self, size: int, length: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Returns the first `length` positions' inputs for `size` rows: cos and sin [B, L, Dh/2], mask [B, L, L]."""
        cos, sin, causal = self.cos[:length], self.sin[:length], self.mask[:length, :length]
        return (cos.expand(size, -1, -1), sin.expand(size, -1, -1)), causal.expand(size, -1, -1)


def row_loss(model: Llama, rows: Tensor, positions: Positions, dropout: float = 0.0) -> Tensor:
    """Returns the mean cross-entropy in nats of each row's tokens after the first. rows: [B, L+1] int64."""
    tokens, targets = rows[:, :-1], rows[:, 1:]
    B, L = tokens.shape
    steps = positions.batch(B, L)
    x = F.dropout(model.tok_embeddings(tokens), dropout)
    for layer in cast(Iterable[Block], model.layers.values()):
        out, _, _ = layer.attention.attend(*layer.project(x), *steps)
        x = x + F.dropout(layer.attention.wo(out), dropout)
        normed = cast(Norm, layer.ffn_norm)(x)
        x = x + F.dropout(layer.feed_forward(normed), dropout)
    logits = model.head.output(model.head.norm(x)).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def evaluate(model: Llama, stories: Iterable[list[int]]) -> tuple[float, int]:
    """Returns the sum of the tokens' losses in nats, and the number of tokens. Each story is run alone, from BOS."""
    positions = Positions.of(model.config)
    nats, count = 0.0, 0
    for story in stories:
        for start in range(0, len(story) - 1, model.config.context):
            row = torch.tensor([story[start : start + model.config.context + 1]])
            nats += row_loss(model, row, positions).item() * (row.shape[1] - 1)
            count += row.shape[1] - 1
    return nats, count


def initialise(model: Llama, seed: int) -> None:
    """Sets normal weights of deviation 0.02, or 0.02 / sqrt(2 * n_layers) if they write to the residual stream."""
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            depth = math.sqrt(2 * model.config.n_layers) if name.endswith(("wo.weight", "w2.weight")) else 1.0
            torch.nn.init.normal_(weight, std=0.02 / depth)


def learning_rate(step: int, options: TrainOptions) -> float:
    """Returns the learning rate of a step: a linear warm-up, then a cosine from the peak to a twentieth of it."""
    if step < options.warmup:
        return options.learning_rate * (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True)
class Progress:
    """The progress after `step` steps: losses in nats a token, speed in tokens a second, remaining time in seconds."""

    step: int
    loss: float
    valid_loss: float
    speed: float
    remaining: float


def train(
    model: Llama, stories: Sequence[list[int]], valid: Sequence[list[int]], options: TrainOptions
) -> Iterator[Progress]:
    """Trains the model in place from new weights; yields a report every `options.every` steps and at the end."""
    initialise(model, options.seed)
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    gains = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    gradients = _gradients(model, options)
    rows = pack(stories, model.config.context, options.seed)

    losses: list[float] = []
    started, spent = time.monotonic(), 0.0
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        losses.append(gradients([next(rows) for _ in range(options.batch)]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % options.every == 0 or done == options.steps:
            spent += time.monotonic() - started
            speed = done * options.batch * model.config.context / spent
            nats, count = evaluate(model, valid)
            remaining = spent / done * (options.steps - done)
            yield Progress(done, sum(losses) / len(losses), nats / count, speed, remaining)
            losses, started = [], time.monotonic()


def _gradients(model: Llama, options: TrainOptions) -> Callable[[list[list[int]]], float]:
    """Returns a function that adds the gradients of a batch of rows and returns the batch's loss."""
    positions = Positions.of(model.config)
    loss_of = torch.compile(row_loss) if options.fast else row_loss

    def gradients(rows: list[list[int]]) -> float:
        total = 0.0
        parts = [torch.tensor(rows[i : i + options.micro]) for i in range(0, len(rows), options.micro)]
        for part in parts:
            with torch.autocast("cpu", torch.bfloat16, enabled=options.fast):
                loss = loss_of(model, part, positions, options.dropout) / len(parts)
            torch.autograd.backward(loss)
            total += loss.item()
        return total

    return gradients


def hugging_face_config(config: ModelConfig) -> dict[str, object]:
    """Returns the contents of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": BOS,
        "dtype": "float16",
        "eos_token_id": EOS,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "max_position_embeddings": config.context,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": config.n_heads,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
        "vocab_size": config.vocab_size,
    }


def checkpoint_files(model: Llama, tokenizer: bytes) -> dict[str, bytes]:
    """Returns the checkpoint's files by name, with weights in float16."""
    weights = {renamed(name, HUGGING_FACE_NAMES): weight.detach().half() for name, weight in model.named_parameters()}
    return {
        "config.json": (json.dumps(hugging_face_config(model.config), indent=2) + "\n").encode(),
        "model.safetensors": safetensors.torch.save(weights, metadata={"format": "pt"}),
        "tokenizer.model": tokenizer,
    }


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Replaces the named files of a folder all at once, and keeps its other files.

    A new folder is written beside the old one and takes its place when it is complete.
    """
    partial, previous = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "previous"))
    if previous.exists() and not folder.exists():  # an earlier write stopped between its two renames
        previous.rename(folder)
    shutil.rmtree(partial, ignore_errors=True)
    if folder.exists():
        shutil.copytree(folder, partial)
    partial.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (partial / name).write_bytes(content)
    shutil.rmtree(previous, ignore_errors=True)
    if folder.exists():
        folder.rename(previous)
    partial.rename(folder)
    shutil.rmtree(previous, ignore_errors=True)


@torch.no_grad()
def sample(model: Llama, seeds: Sequence[int], length: int, temperature: float) -> list[list[int]]:
    """Returns `length` tokens from BOS for every seed, continuing into further stories; temperature 0 is greedy."""
    B, config = len(seeds), model.config
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    caches = torch.zeros(2, config.n_layers, B * config.n_kv_heads, length, config.head_dim)
    cos, sin = rope.tables(config, length)
    tokens = torch.full((B, 1), BOS)
    for position in range(length - 1):
        angles = (cos[position].expand(B, 1, -1), sin[position].expand(B, 1, -1))
        masks = [mask.causal(position, 1, length).expand(B, -1, -1)] * config.n_layers
        cached = [BlockCache(*both) for both in zip(*caches, strict=True)]
        keys, values, logits, *_ = model(tokens[:, -1:], angles, masks, torch.ones(B, 1, 1), cached)
        caches[:, :, :, position] = torch.stack((torch.stack(keys), torch.stack(values))).squeeze(3)
        if temperature:
            chances = torch.softmax(logits[:, 0] / temperature, dim=-1)
            drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(chances, generators, strict=True)]
            tokens = torch.cat((tokens, torch.stack(drawn)), dim=1)
        else:
            tokens = torch.cat((tokens, logits.argmax(dim=-1)), dim=1)
    return tokens.tolist()


def longest_copy(samples: Iterable[Sequence[int]], stories: Iterable[Sequence[int]]) -> int:
    """Returns the length in tokens of the longest run that a sample has in common with the concatenated stories."""
    text = "".join(chr(token) for story in stories for token in story)
    longest = 0
    for tokens in samples:
        written = "".join(map(chr, tokens))
        for start in range(len(written)):
            while len(written) - start > longest and written[start : start + longest + 1] in text:
                longest += 1
    return longest


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns exit code 0, or 2 for bad input."""
    args = _parser().parse_args(arguments)
    output = args.output or Path("model", args.preset)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        stories, valid = read_corpus(args.data, args.valid)
        if args.evaluate:
            _evaluate_command(output, stories, valid)
        else:
            _train_command(args, output, stories, valid)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.train_tiny.train",
        description="Trains a small Llama and its tokenizer on short stories.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE", help="training text; no default")
    parser.add_argument("--valid", type=Path, required=True, metavar="FILE", help="validation text; no default")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: model/PRESET")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="2.4 or 9.7 million parameters")
    parser.add_argument("--evaluate", action="store_true", help="train nothing: measure the model in --output")
    parser.add_argument("--steps", type=_positive, metavar="N", help="default: the preset's")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--threads", type=_positive, metavar="N", help="1 is steadiest beside other work; default: all cores"
    )
    parser.add_argument("--fast", action="store_true", help="torch.compile and bfloat16 (needs a C++ compiler)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _check_output(folder: Path, fast: bool) -> None:
    """Checks the compiler and the output folder before the training, so that it does not fail at its end."""
    if fast and not shutil.which(compiler := os.environ.get("CXX", "g++")):
        raise InputError(f"--fast needs a C++ compiler and {compiler} is not installed: install it or set CXX")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): give another --output") from error


def _train_command(args: argparse.Namespace, output: Path, stories: list[str], valid: list[str]) -> None:
    _check_output(output, args.fast)
    preset = PRESETS[args.preset]
    steps = args.steps or preset.options.steps
    options = dataclasses.replace(preset.options, steps=steps, seed=args.seed, fast=args.fast)
    tokenizer = train_tokenizer(stories, preset.config.vocab_size)
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    model = Llama(preset.config)
    encoded = encode(processor, stories)
    print(f"{sum(map(len, encoded))} tokens, {sum(weight.numel() for weight in model.parameters())} parameters")
    best = math.inf
    for state in train(model, encoded, encode(processor, valid[::VALID_SHARE]), options):
        kept = state.valid_loss < best
        if kept:
            best = state.valid_loss
            write_folder(output, checkpoint_files(model, tokenizer))
        print(
            f"step {state.step}/{options.steps}  loss {state.loss:.4f}  valid {state.valid_loss:.4f}  "
            f"{state.speed:.0f} tok/s  {state.remaining / 60:.1f} min left{'  saved' if kept else ''}",
            flush=True,
        )


def _evaluate_command(folder: Path, stories: list[str], valid: list[str]) -> None:
    model = open_checkpoint(folder).build()
    if not (folder / "tokenizer.model").is_file():
        raise InputError(f"{folder} holds no tokenizer.model: give a folder that this command has written")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    nats, count = evaluate(model, encode(processor, valid))
    size = sum(len(story.encode()) for story in valid)
    print(f"validation loss {nats / count:.4f} nats/token over {count} tokens of {len(valid)} stories")
    print(f"bits per byte {nats / math.log(2) / size:.4f} over {size} bytes")
    longest = longest_copy(sample(model, range(20), 256, 0.8), encode(processor, stories))
    verdict = "none of 30 or more" if longest < COPY_LIMIT else f"COPIED: the limit is {COPY_LIMIT - 1}"
    print(f"longest run shared with the training text: {longest} tokens ({verdict}) in 20 samples of 256 tokens")
    print(processor.decode(sample(model, [0], 256, 0.0)[0]))


if __name__ == "__main__":
    sys.exit(main())
