"""The endpoints /tokenize and /detokenize, which are llama.cpp's server's."""

from typing import Any

from preproc.tokenizer import StreamDecoder
from runtime.engine.session import check_tokens
from runtime.serving.request_body import Body, blamed_on, read_body
from runtime.serving.served_model import Model


class TokenizeBody(Body):
    """The parameters of /tokenize.

    Attributes:
        add_special: whether BOS comes first, if the model has one.
        parse_special: whether the text of a special token becomes that token.
        with_pieces: whether each token comes with its text, or its bytes if these are not valid UTF-8.
    """

    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeBody(Body):
    """The parameters of /detokenize."""

    tokens: list[int]


def tokenized(raw: bytes, model: Model) -> dict[str, Any]:
    """Answers POST /tokenize.

    Raises:
        RequestError: the body is invalid.
    """
    body, bos_id = read_body(raw, TokenizeBody), model.metadata.bos_id
    ids = model.tokenizer.encode(body.content, body.parse_special)
    if body.add_special and bos_id is not None:
        ids = [bos_id, *ids]
    if not body.with_pieces:
        return {"tokens": ids}
    names = _names(model)
    return {"tokens": [{"id": token, "piece": names.get(token) or _piece(model, token)} for token in ids]}


def detokenized(raw: bytes, model: Model) -> dict[str, Any]:
    """Answers POST /detokenize.

    Raises:
        RequestError: the body is invalid.
    """
    body = read_body(raw, DetokenizeBody)
    if body.tokens:
        with blamed_on("tokens"):
            check_tokens(body.tokens, model.metadata.config.vocab_size)
    names, decoder = _names(model), StreamDecoder(model.tokenizer)
    said = [names.get(token) or decoder.add(token) for token in body.tokens]
    return {"content": "".join(said) + decoder.finish()}


def _names(model: Model) -> dict[int, str]:
    return {token: text for text, token in model.tokenizer.specials.items()}


def _piece(model: Model, token: int) -> str | list[int]:
    piece = model.tokenizer.piece(token, first=False)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
