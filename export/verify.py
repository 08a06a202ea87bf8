"""The verify command: compares a .pte with the eager model it was made from, and a quantised model with the float32
model.

The first comparison checks that the file computes what the eager model computes, in prefill and decode. The reference
processes each sequence in one pass without caches, so that the comparison also detects errors in a cache, a mask or a
rotary table. The second comparison measures the cost of quantisation, see `export.quality.perplexity`.

    python -m export.verify tiny.pte
    python -m export.verify llama.pte --checkpoint path/to/Llama-3.2-1B --eval-text mine.txt --report
"""

from runtime.cli import command

if __name__ == "__main__":
    command.start("export.verify")

import tempfile
from collections.abc import Sequence
from pathlib import Path

from export.checkpoints import hub
from export.checkpoints.adapters import Adapter, add_lora_flag, open_adapters
from export.checkpoints.layouts import BUILT_IN, open_checkpoint
from export.quality.gptq import CalibrationText, calibrate
from export.quality.perplexity import Gate
from export.quality.verification import add_flags, check_same, verify
from export.weights.scheme import Scheme
from export.weights.source import WeightSource
from model.errors import InputError
from preproc.tokenizer import from_bytes
from runtime.cli import command
from runtime.engine.program import files, read_metadata
from runtime.pte.metadata import Metadata


def _with_calibration(source: WeightSource, file: Path, path: Path | None, folder: Path) -> WeightSource:
    """Returns the source with its matrices calibrated as in the file, on the text at `path` or on the built-in text.
    They are kept in `folder`.

    A file made without calibration returns the source unchanged.

    Raises:
        InputError: the file and the model have different dimensions, or the text is not the one used for the file.
    """
    metadata = read_metadata(file)
    made_with = metadata.provenance.get("calibration")
    if made_with is None and path is None:
        return source
    if made_with is None:
        raise InputError(f"--calibrate {path} needs a calibrated file, but {file} is not one; leave it out")
    text = CalibrationText.of(path, source.scheme.rounding)
    if text is None or (path is None and text.sha256 != made_with["sha256"]):
        raise InputError(f"{file} was calibrated with a text; give that text with --calibrate FILE")
    if text.sha256 != made_with["sha256"]:
        raise InputError(
            f"--calibrate {path} is not the text that {file} was calibrated with (SHA-256 {text.sha256} is not "
            f"{made_with['sha256']}); give that text"
        )
    check_same(metadata, source)
    texts = text.windows(from_bytes(metadata.tokenizer, metadata.tokenizer_kind), metadata.bos_id, metadata.max_seq_len)
    return calibrate(source, texts, metadata.max_seq_len, folder)


def _check_adapters(file: Path, metadata: Metadata, adapters: Sequence[Adapter]) -> None:
    """Checks that the adapters are those that the file was made with. Their names and places may have changed.

    Raises:
        InputError: there are others.
    """
    made_with = metadata.provenance.get("adapters") or []
    wanted = [(each["sha256"], each["scale"]) for each in made_with]
    if wanted != [(adapter.sha256, adapter.scale) for adapter in adapters]:
        flags = " ".join(f"--lora {each['name']}:{each['scale']:g}" for each in made_with)
        raise InputError(
            f"{file} was made with {flags or 'no adapter'}, unlike the adapters given here; give "
            f"{'these, with the same content' if flags else 'no --lora'}"
        )


def main(arguments: list[str] | None = None) -> int:
    """Runs the command. Returns exit code 0 if the file passes, 1 if it does not, 2 for bad input."""
    parser = command.parser("export.verify", "Compares a .pte file with its checkpoint.", __doc__)
    parser.add_argument("file", type=Path, help=".pte file, or folder of shards or slices")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=BUILT_IN,
        metavar="PATH",
        help="checkpoint of the file: a path, or org/name on the Hugging Face hub (default: the built-in model)",
    )
    add_lora_flag(parser)
    hub.add_flags(parser)
    add_flags(parser)
    parser.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="text that the file was calibrated with; needed if it was"
    )
    parser.add_argument(
        "--report", action="store_true", help="write a report (.json and .html) beside a quantised file"
    )
    options = parser.parse_args(arguments)
    gate = Gate.of(options.eval_text, options.max_ppl_increase)
    metadata = read_metadata(options.file)
    scheme = Scheme.of(metadata)
    if options.report and scheme.max_ppl_increase is None:
        raise InputError(f"--report needs a quantised file, but {options.file} is float32; leave it out")
    adapters = open_adapters(options.lora, options.hub_token, options.cache_dir)
    _check_adapters(options.file, metadata, adapters)
    checkpoint = open_checkpoint(options.checkpoint, options.hub_token, options.cache_dir, adapters)
    config = checkpoint.config.for_length(metadata.max_seq_len)
    slices = metadata.provenance["options"].get("tensor_parallel", 1)
    source = WeightSource(config, checkpoint.weights, scheme, slices=slices, blocks=checkpoint.blocks)
    with tempfile.TemporaryDirectory(prefix="llama-pte-") as folder:
        source = _with_calibration(source, options.file, options.calibrate, Path(folder))
        verdict = verify(options.file, source, gate)
    print(f"{options.file}: {verdict}: {'passed' if verdict.failure is None else f'FAILED: {verdict.failure}'}")
    if options.report:
        print(verdict.outcome.save(options.file, sum(file.stat().st_size for file in files(options.file))))
    return 0 if verdict.failure is None else 1
