"""The inspect command: prints the contents of a .pte file, or of a checkpoint and what it would become.

python -m export.inspect tiny.pte
python -m export.inspect tiny.pte --format json
python -m export.inspect path/to/Llama-3.2-1B --max-seq-len 4096
"""

from runtime.cli import command

if __name__ == "__main__":
    command.start("export.inspect")

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from export.checkpoints import hub
from export.checkpoints.adapters import add_lora_flag
from export.checkpoints.checkpoint import starred
from export.checkpoints.layouts import LAYOUTS
from export.planning.description import describe_checkpoint
from export.planning.memory import cache_bytes, memory_use
from export.planning.plan import DEFAULT_CONTEXT, ExportOptions
from export.weights.scheme import Scheme, format_exceptions
from model.config import ModelConfig
from model.errors import InputError
from runtime.engine.program import files, read_metadata
from runtime.pte.metadata import Metadata


def describe(metadata: Metadata, size: int) -> dict[str, Any]:
    """Returns everything that `inspect` prints, as JSON types. `size` is the size of the file in bytes."""
    config, memory, kv_dtype = metadata.config, memory_use(metadata), Scheme.of(metadata).kv_dtype
    heads = max((spec.sizes(1)[0] // metadata.batch_size for spec in metadata.caches), default=config.n_kv_heads)
    cached = dataclasses.replace(config, n_heads=heads, n_kv_heads=heads)
    lengths = sorted({metadata.max_seq_len, *(2**i for i in range(7, 18) if 2**i < metadata.max_seq_len)})
    return {
        "file_bytes": size,
        "config": dataclasses.asdict(config),
        "max_seq_len": metadata.max_seq_len,
        "batch_size": metadata.batch_size,
        "bos_id": metadata.bos_id,
        "stop_ids": list(metadata.stop_ids),
        "sampling": dict(metadata.sampling),
        "tokenizer": {"kind": metadata.tokenizer_kind, "bytes": len(metadata.tokenizer)},
        "methods": [{"name": spec.name, "tokens": [spec.min_length, spec.max_length]} for spec in metadata.methods],
        "requirements": dataclasses.asdict(metadata.requirements),
        "provenance": metadata.provenance,
        "weights": _weights(metadata),
        "memory": dataclasses.asdict(memory) | {"total": memory.total, "mapped": size},
        "cache_bytes_by_context": {n: cache_bytes(cached, n, kv_dtype) for n in lengths if memory.caches},
    }


def _weights(metadata: Metadata) -> dict[str, Any]:
    """Returns the weight formats in words, and the matrices with a format other than the usual one."""
    scheme = Scheme.of(metadata)
    return {
        "quantize": metadata.provenance["options"]["quantize"],
        "linear": str(scheme.linear),
        "head": str(scheme.head),
        "embedding": str(scheme.embedding),
        "kv_cache": scheme.kv_dtype,
        "rounding": scheme.rounding,
        "kept": {name: str(form) for name, form in format_exceptions(metadata.config, scheme).items()},
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Returns exit code 0, or 2 for bad input."""
    flags = vars(_parser().parse_args(arguments))
    path, as_json = flags.pop("path"), flags.pop("format") == "json"
    if _is_checkpoint(path):
        found = describe_checkpoint(ExportOptions(checkpoint=path, **flags))
        text = _checkpoint_text(found)
    else:
        if given := [f"--{name.replace('_', '-')}" for name, value in flags.items() if value]:
            raise InputError(f"{given[0]} is for checkpoints and has no effect on the file {path}; leave it out")
        found = describe(read_metadata(path), sum(file.stat().st_size for file in files(path)))
        text = _text(path, found)
    print(json.dumps(found, indent=2) if as_json else text)
    return 0


def _parser() -> argparse.ArgumentParser:
    description = "Prints the contents of a .pte file, or of a checkpoint and what it would become in each scheme."
    parser = command.parser("export.inspect", description, __doc__)
    add = parser.add_argument
    add(
        "path",
        type=Path,
        help=".pte file, folder of shards or slices, or checkpoint: Hugging Face or Meta folder, GGUF, llama2.c .bin, "
        "or org/name on the Hugging Face hub",
    )
    add("--format", choices=("text", "json"), default="text", help="output format (default: %(default)s)")
    add(
        "--max-seq-len",
        type=int,
        metavar="N",
        help="of a checkpoint: maximum length of prompt and answer together, for which memory is computed (default: "
        f"the model's context, at most {DEFAULT_CONTEXT})",
    )
    add_lora_flag(parser)
    hub.add_flags(parser)
    return parser


def _is_checkpoint(path: Path) -> bool:
    """Returns whether a path is a checkpoint, and not a .pte or a folder of shards or slices."""
    if path.is_dir():
        return not any(path.glob("*.pte"))
    return hub.is_hub_name(path) or any(layout.matches(path) for layout in LAYOUTS)


def _checkpoint_text(found: dict[str, Any]) -> str:
    parameters, tokenizer, stored = found["parameters"], found["tokenizer"], found["stored_bytes"]
    config, total = ModelConfig.from_json(found["config"]), sum(found["stored_bytes"].values())
    active = f", {parameters['active'] / 1e6:,.1f} for each token" if config.n_experts else ""
    experts = f", {config.n_chosen_experts} of {config.n_experts} experts" if config.n_experts else ""
    shares = ", ".join(f"{kind} {size / total:.1%}" for kind, size in stored.items())
    found_beside = ", ".join(found["ignored_files"])
    lines = [
        f"{found['checkpoint']}: {found['layout']}, {found['architecture']}",
        f"model        {parameters['total'] / 1e6:,.1f} million parameters{active}",
        f"             {config.n_layers} layers, dim {config.dim}, feed-forward {config.hidden_dim}{experts}",
        f"             {config.n_heads} heads, {config.n_kv_heads} KV heads, head_dim {config.head_dim}",
        f"             vocabulary {config.vocab_size}, embedding and head {'tied' if config.tied else 'separate'}",
        f"context      {config.context} positions, {_positions(config)}",
        f"tokenizer    {tokenizer['kind']}; chat template: {'yes' if found['chat_template'] else 'no'}",
        f"stored       {total / 1e6:.1f} MB of weights: {shares}",
        *(f"             {note}" for note in found["notes"]),
        *([f"not read     {found_beside}"] if found_beside else []),
        "",
        f"exported with --max-seq-len {found['max_seq_len']} and --quantize:",
        f"  {'':12}{'file, mapped':>14}{'memory':>14}  quality",
        *(f"  {_scheme_line(scheme, found['default'])}" for scheme in found["schemes"]),
        "",
        "memory is that of the process, without the runtime and the mapped file; quality: docs/quantisation.md",
        *(f"problem: {each}" for each in found["problems"]),
        f"next: {found['command']}",
    ]
    return "\n".join(lines)


def _positions(config: ModelConfig) -> str:
    """Returns how a model encodes positions, in words."""
    if config.positions != "rope":
        return {"learned": "learned embeddings", "alibi": "ALiBi"}[config.positions]
    scaling = config.rope_scaling
    scaled = f", {scaling.kind} scaling from {scaling.original_context}" if scaling else ""
    window = f", window {config.sliding_window} in {len(config.local_layers)} layers" if config.local_layers else ""
    return f"rope theta {config.rope_theta:g}{scaled}{window}"


def _scheme_line(scheme: dict[str, Any], default: str) -> str:
    unlike = "".join(f"; {count} matrices are {form}" for form, count in scheme["unlike"].items())
    usual = " (default)" if scheme["quantize"] == default else ""
    sizes = "".join(f"{size / 1e6:>11.1f} MB" for size in (scheme["file_bytes"], scheme["memory"]["total"]))
    return f"{scheme['quantize']:12}{sizes}  {scheme['quality']}{unlike}{usual}"


def _backend(provenance: dict[str, Any]) -> str:
    options = provenance["options"]
    count = options.get("tensor_parallel", 1)
    slices = f", in {count} slices" if count > 1 else ""
    unverified = "" if provenance["verified"] else "; not verified, because the machine that exported it cannot run it"
    return options["backend"] + slices + unverified


def _span(least: int, most: int) -> str:
    return str(most) if least == most else f"{least} to {most}"


def _kept(formats: Mapping[str, str], n_layers: int) -> list[str]:
    """Returns a line for each role and format of matrices, given by name, with the blocks in which it has the
    format.
    """
    layers = dict[tuple[str, str], list[int]]()
    for name, form in formats.items():
        role = starred(name).removeprefix("layers.*.").removesuffix(".weight")
        layers.setdefault((role, form), []).extend([int(name.split(".")[1])] * name.startswith("layers."))
    return [
        f"{role}{_blocks(sorted(set(numbers)), n_layers)}: {form}" for (role, form), numbers in sorted(layers.items())
    ]


def _blocks(numbers: Sequence[int], n_layers: int) -> str:
    if not numbers or len(numbers) == n_layers:
        return ""
    firsts = [number for number in numbers if number - 1 not in numbers]
    lasts = [number for number in numbers if number + 1 not in numbers]
    return " of blocks " + ", ".join(map(_span, firsts, lasts))


def _text(file: Path, found: dict[str, Any]) -> str:
    config, memory, weights = found["config"], found["memory"], found["weights"]
    methods = ", ".join(f"{method['name']} ({_span(*method['tokens'])})" for method in found["methods"])
    needs = ", ".join((*found["requirements"]["backends"], *found["requirements"]["operators"]))
    made_by = ", ".join(f"{name} {number}" for name, number in found["provenance"]["versions"].items())
    lines = [
        f"{file}: {found['file_bytes'] / 1e6:.1f} MB",
        f"model        {', '.join(f'{name} {value}' for name, value in config.items() if value is not None)}",
        f"context      {found['max_seq_len']} positions, batch {found['batch_size']}",
        f"tokens       BOS {found['bos_id']}, stop {found['stop_ids']}, tokenizer {found['tokenizer']['kind']}",
        "sampling     " + (", ".join(f"{k} {v:g}" for k, v in found["sampling"].items()) or "nothing recommended"),
        f"methods      {methods}",
        f"backend      {_backend(found['provenance'])}",
        f"needs        ExecuTorch {found['requirements']['executorch']}: {needs}",
        f"weights      {weights['quantize']}: linear {weights['linear']}, head {weights['head']}, embedding "
        f"{weights['embedding']}; KV cache {weights['kv_cache']}",
        *(f"             {line}" for line in _kept(weights["kept"], config["n_layers"])),
        f"made by      {made_by}",
        f"checkpoint   {found['provenance']['checkpoint']}",
        "",
        "memory of the process, without the runtime:",
        *(f"  {name:12}{memory[name] / 1e6:10.1f} MB" for name in ("weights", "caches", "activations", "total")),
        f"  {'mapped':12}{memory['mapped'] / 1e6:10.1f} MB  the file, which the system may drop and read again",
        *(["", "KV caches by context:"] if memory["caches"] else []),
        *(f"  {length:>12}{size / 1e6:10.1f} MB" for length, size in found["cache_bytes_by_context"].items()),
    ]
    return "\n".join(lines)
