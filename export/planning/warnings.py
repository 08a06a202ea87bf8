"""Warnings to the user before an export."""

from collections.abc import Sequence

from export.checkpoints.checkpoint import Checkpoint
from export.planning.cpp_tokenizer import unsupported_in_cpp
from preproc.tokenizer import Tokenizer


def warnings_of(
    checkpoint: Checkpoint, tokenizer: Tokenizer | None, max_seq_len: int, stop_ids: Sequence[int]
) -> tuple[str, ...]:
    """Returns warnings about a checkpoint, its tokenizer, and the length that it is exported for."""
    context, scaling, found = checkpoint.config.context, checkpoint.config.rope_scaling, list(checkpoint.warnings)
    if max_seq_len > context:
        how = f"; its {scaling.kind} scaling is stretched to that length" if scaling else ""
        found.append(f"--max-seq-len {max_seq_len} is more than the {context} positions the model was trained for{how}")
    if scaling and scaling.kind == "longrope" and max_seq_len > scaling.original_context:
        found.append(
            f"texts of up to {scaling.original_context} tokens also use the factors for longer ones, unlike in "
            "transformers; --original-context exports for short texts only"
        )
    if tokenizer and not stop_ids:
        found.append("the checkpoint names no token that ends a text, so answers end only at their length limit")
    if tokenizer and (lacking_in_cpp := unsupported_in_cpp(tokenizer.data)):
        found.append(f"llama_runner cannot use this tokenizer: {lacking_in_cpp}; the Python runtime can")
    return tuple(f"warning: {each}" for each in found)
