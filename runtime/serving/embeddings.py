"""The endpoint /v1/embeddings: a vector for each text, made from the model's hidden states."""

import base64
from typing import Any, Literal

from pydantic import Field

from runtime.serving.jobs import Jobs
from runtime.serving.openai_bodies import MOST_TEXTS, PROMPTS
from runtime.serving.openai_request import CompletionRequest, Text, listed, prompt_of
from runtime.serving.request_body import Body, read_body, refuse
from runtime.serving.served_model import Model
from runtime.text.generation import GenerationOptions


class EmbeddingsBody(Body):
    """The parameters of /v1/embeddings."""

    input: str | list[int] | list[str | list[int]] = Field(description=PROMPTS)
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


def read_embeddings(raw: bytes, model: Model) -> tuple[CompletionRequest, EmbeddingsBody]:
    """Reads the body of POST /v1/embeddings.

    Raises:
        RequestError: it cannot be answered.
    """
    body, dim = read_body(raw, EmbeddingsBody), model.metadata.config.dim
    if not any(spec.name == "hidden" for spec in model.metadata.methods[0].outputs):
        refuse("model", "the file returns no hidden states, which embeddings need; export it with --hidden-states")
    if model.metadata.batch_size > 1:
        several = "the file was exported for several texts at once, which gives no embeddings"
        refuse("model", f"{several}; export another without --batch-size")
    if body.dimensions not in (None, dim):
        refuse("dimensions", f"dimensions {body.dimensions} is unsupported; give {dim}, or leave it out")
    given = listed(body.input)
    if len(given) > MOST_TEXTS:
        refuse("input", f"input has {len(given)} texts; give at most {MOST_TEXTS}")
    prompts = [prompt_of(model, "input", each) for each in given]
    texts = [Text(i, 0, None) for i in range(len(prompts))]
    warnings = body.warnings + model.warnings(body.model)
    options = GenerationOptions(max_new_tokens=1)
    return CompletionRequest(
        False, prompts, texts, 1, options, None, False, False, embeds=True, warnings=warnings
    ), body


def embeddings_reply(request: CompletionRequest, body: EmbeddingsBody, model: Model, jobs: Jobs) -> dict[str, Any]:
    """Returns the answer, when the jobs have ended."""
    vectors = [jobs.vector(i).numpy().astype("<f4") for i in range(len(request.prompts))]
    is_text = body.encoding_format == "base64"
    told = [base64.b64encode(each.tobytes()).decode() if is_text else each.tolist() for each in vectors]
    count = sum(map(len, request.prompts))
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": each} for index, each in enumerate(told)],
        "model": model.name,
        "usage": {"prompt_tokens": count, "total_tokens": count},
        **({"warnings": request.warnings} if request.warnings else {}),
    }
