"""A common interface to SentencePiece, tiktoken and Hugging Face tokenizer.json tokenizers.

The kind is detected from the content of the file. An exported file carries exactly the bytes that were opened.
"""

import base64
import binascii
import codecs
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tiktoken
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from model.errors import InputError, listed
from preproc.special_tokens import Part, Special, SpecialText

SENTENCEPIECE, TIKTOKEN, HUGGING_FACE = "sentencepiece", "tiktoken", "tokenizer.json"

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Regular expression by which Llama 3 splits text before merging (meta-llama/llama-models,
models/llama3/tokenizer.py).
"""

_LLAMA3_NAMED_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
LLAMA3_SPECIALS = (
    *_LLAMA3_NAMED_SPECIALS,
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 2 + 256 - len(_LLAMA3_NAMED_SPECIALS))),
)
"""The 256 special tokens that follow Llama 3's ranks, in the order of their ids."""


class Tokenizer(Protocol):
    """Interface for converting text to token ids and back.

    Attributes:
        kind: one of the kinds named in this module.
        data: bytes of the tokenizer's file; `from_bytes(data)` returns an equal tokenizer.
        vocab_size: number of ids, which run from 0 to vocab_size - 1.
        bos_id: id that starts a text, or None.
        stop_ids: ids that end a text; may be empty.
        specials: maps each special token to its id.
        fixed: maps each text that is not a special token, but always becomes a single token, to its id.
    """

    kind: str
    data: bytes
    vocab_size: int
    bos_id: int | None
    stop_ids: tuple[int, ...]
    specials: Mapping[str, int]
    fixed: Mapping[str, int]

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Returns the ids of a text without adding BOS. The text of a special token is ordinary text unless
        `parse_special`.
        """
        ...

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        """Returns the ids of a text given in parts. Boundaries between parts have no effect on the ids: all text
        between two special tokens is encoded together.
        """
        ...

    def piece(self, token: int, first: bool) -> bytes:
        """Returns the bytes of one id within a text.

        Control tokens and ids outside the vocabulary, which a model with a padded vocabulary can produce, have no
        bytes.

        Args:
            first: whether no text comes before this id; SentencePiece's dummy space is then removed.
        """
        ...


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Returns the text of ids, with invalid UTF-8 replaced by U+FFFD."""
    decoder = StreamDecoder(tokenizer)
    return "".join([*(decoder.add(token) for token in ids), decoder.finish()])


class StreamDecoder:
    """Converts ids to text one at a time, and never returns part of a UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int] = ()) -> None:
        """Starts after the ids of `prompt`, whose text is not returned. The prompt may end within a character."""
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._first = True
        for token in prompt:
            self.add(token)

    def add(self, token: int) -> str:
        """Returns the text completed by `token`; empty if a character is still incomplete."""
        piece = self._tokenizer.piece(token, self._first)
        self._first = self._first and self._is_control(token)
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """Returns the rest of the text: U+FFFD if the last character is incomplete, otherwise empty."""
        return self._utf8.decode(b"", final=True)

    def _is_control(self, token: int) -> bool:
        return not self._tokenizer.piece(token, first=False)


class SentencePieceTokenizer:
    """A tokenizer in SentencePiece's model format, as used by Llama 1 and 2 (google/sentencepiece)."""

    kind = SENTENCEPIECE

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        self.vocab_size = self._model.vocab_size()
        bos, eos = self._model.bos_id(), self._model.eos_id()
        self.bos_id: int | None = bos if bos >= 0 else None
        self.stop_ids: tuple[int, ...] = (eos,) if eos >= 0 else ()
        control = (i for i in range(self.vocab_size) if self._model.is_control(i))
        self.specials: Mapping[str, int] = {self._model.id_to_piece(i): i for i in control}
        self.fixed: Mapping[str, int] = _user_defined(data)
        self._cutter = SpecialText({text: Special(i) for text, i in self.specials.items()})

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return self.encode_parts([Part(text, parse_special)])

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        return self._cutter.encode(parts, lambda text, first: self._model.encode(text))

    def piece(self, token: int, first: bool) -> bytes:
        if not 0 <= token < self.vocab_size or self._model.is_control(token):
            return b""
        if self._model.is_byte(token):
            return bytes([int(self._model.id_to_piece(token)[3:-1], 16)])  # "<0x0A>"
        if self._model.is_unknown(token):
            return " \N{DOUBLE QUESTION MARK} ".encode()  # the text that SentencePiece itself returns for <unk>
        text = self._model.id_to_piece(token).replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
        return text.removeprefix(" ").encode() if first else text.encode()


class TiktokenTokenizer:
    """A tokenizer in Llama 3's ranks format: one line `base64 rank` per token, followed by the 256 special tokens."""

    kind = TIKTOKEN

    def __init__(self, data: bytes) -> None:
        self.data = data
        ranks = _tiktoken_ranks(data)
        specials = {name: len(ranks) + i for i, name in enumerate(LLAMA3_SPECIALS)}
        self._encoding = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=specials
        )
        self.specials: Mapping[str, int] = specials
        self.fixed: Mapping[str, int] = {}
        self._special_ids = frozenset(specials.values())
        self._cutter = SpecialText({text: Special(i) for text, i in specials.items()})
        self.vocab_size = len(ranks) + len(specials)
        self.bos_id: int | None = specials["<|begin_of_text|>"]
        self.stop_ids: tuple[int, ...] = (specials["<|end_of_text|>"], specials["<|eom_id|>"], specials["<|eot_id|>"])

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return (
            self._encoding.encode(text, allowed_special="all")
            if parse_special
            else self._encoding.encode_ordinary(text)
        )

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        return self._cutter.encode(parts, lambda text, first: self._encoding.encode_ordinary(text))

    def piece(self, token: int, first: bool) -> bytes:
        if not 0 <= token < self.vocab_size or token in self._special_ids:
            return b""
        return self._encoding.decode_single_token_bytes(token)


class HuggingFaceTokenizer:
    """A tokenizer.json, run by the tokenizers library.

    The BOS id is the one that its post-processor puts before a text, as in transformers. Stop ids are not in the file;
    files beside it and the checkpoint's configuration have them.
    """

    kind = HUGGING_FACE

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._model = tokenizers.Tokenizer.from_buffer(data)
        self._model.no_padding()
        self._model.no_truncation()
        self.vocab_size = self._model.get_vocab_size(with_added_tokens=True)
        self.bos_id: int | None = self._leading()
        self.stop_ids: tuple[int, ...] = ()
        added = self._model.get_added_tokens_decoder()
        specials = {t.content: Special(i, t.lstrip, t.rstrip) for i, t in added.items() if t.special}
        self.specials: Mapping[str, int] = {text: special.id for text, special in specials.items()}
        self.fixed: Mapping[str, int] = {t.content: i for i, t in added.items() if not t.special}
        self._special_ids = frozenset(self.specials.values())
        self._cutter = SpecialText(specials)
        self._openers = _openers(self._model.pre_tokenizer)
        self._byte_level = (
            {char: byte for byte, char in _byte_level_alphabet().items()} if "ByteLevel" in _decoders(data) else {}
        )

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        self._model.encode_special_tokens = not parse_special  # the library's name for treating them as ordinary text
        return self._model.encode(text, add_special_tokens=False).ids

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        return self._cutter.encode(parts, self._encode_section)

    def end_with(self, token: str) -> None:
        """Sets the token that ends a text; if the vocabulary has no such token, none does."""
        number = self._model.token_to_id(token)
        self.stop_ids = () if number is None else (number,)

    def _leading(self) -> int | None:
        """Returns the id that the post-processor puts before a text, or None."""
        plain, whole = (self._model.encode("a", add_special_tokens=adds).ids for adds in (False, True))
        return whole[0] if whole[: len(plain)] != plain else None

    def _encode_section(self, text: str, first: bool) -> list[int]:
        for opener in self._openers:
            opener.prepend_scheme = "first" if first else "never"
        try:
            return self.encode(text)
        finally:
            for opener in self._openers:
                opener.prepend_scheme = "first"

    def piece(self, token: int, first: bool) -> bytes:
        text = self._model.id_to_token(token)
        if text is None or token in self._special_ids:
            return b""
        if self._byte_level:
            return b"".join(
                bytes([self._byte_level[char]]) if char in self._byte_level else char.encode() for char in text
            )
        if re.fullmatch("<0x[0-9A-F]{2}>", text):
            return bytes([int(text[3:-1], 16)])
        text = text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
        return text.removeprefix(" ").encode() if first else text.encode()


def _user_defined(data: bytes) -> dict[str, int]:
    """Returns the user-defined pieces of a SentencePiece model, which it never splits, and their ids."""
    pieces = sentencepiece_model.ModelProto.FromString(data).pieces
    return {piece.piece: i for i, piece in enumerate(pieces) if piece.type == piece.USER_DEFINED}


def _openers(
    pre_tokenizer: tokenizers.pre_tokenizers.PreTokenizer | None,
) -> list[tokenizers.pre_tokenizers.Metaspace]:
    """Returns the stages of a pre-tokenizer that put a space before the first word of a text and nowhere else."""
    is_sequence = isinstance(pre_tokenizer, tokenizers.pre_tokenizers.Sequence)
    stages = list(pre_tokenizer) if is_sequence else [pre_tokenizer]  # type: ignore[call-overload]
    is_opener = (isinstance(stage, tokenizers.pre_tokenizers.Metaspace) for stage in stages)
    return [stage for stage, found in zip(stages, is_opener, strict=True) if found and stage.prepend_scheme == "first"]


def _tiktoken_ranks(data: bytes) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise InputError(f"line {number} of the tiktoken file is not `base64 rank`; copy the file again") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError(f"the tiktoken file's {len(ranks)} ranks have gaps or repeats; copy the file again")
    return ranks


def _decoders(data: bytes) -> set[str]:
    """Returns the kinds of a tokenizer.json's decoder and of its steps.

    Raises:
        InputError: a step changes text in a way that `HuggingFaceTokenizer.piece` does not implement.
    """
    decoder = json.loads(data).get("decoder") or {}
    kinds = {step.get("type") for step in (decoder, *decoder.get("decoders", ()))} - {None}
    if unknown := kinds - {"Sequence", "ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        raise InputError(f"its decoder {listed(unknown)} is unsupported; give a byte-level or SentencePiece-like BPE")
    return kinds


def _byte_level_alphabet() -> dict[int, str]:
    """Returns GPT-2's printable character for every byte (openai/gpt-2, src/encoder.py, bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


_KINDS: dict[str, Callable[[bytes], Tokenizer]] = {
    SENTENCEPIECE: SentencePieceTokenizer,
    TIKTOKEN: TiktokenTokenizer,
    HUGGING_FACE: HuggingFaceTokenizer,
}


def kind_of(data: bytes) -> str:
    """Detects the kind of a tokenizer file: a JSON object, `base64 rank` lines, or SentencePiece's protobuf, whose
    first field has the tag 0x0A.

    Raises:
        InputError: the content is none of these.
    """
    if data.lstrip()[:1] == b"{":
        return HUGGING_FACE
    first_line = data[:512].split(b"\n")[0].split()
    if len(first_line) == 2 and first_line[1].isdigit():
        return TIKTOKEN
    if data[:1] == b"\n":
        return SENTENCEPIECE
    raise InputError("its content is neither SentencePiece, tiktoken ranks nor a tokenizer.json")


def from_bytes(data: bytes, kind: str | None = None) -> Tokenizer:
    """Opens a tokenizer from the bytes of its file. The kind is detected from the content unless given.

    Raises:
        InputError: the bytes are damaged or not a tokenizer of a known kind.
    """
    kind = kind or kind_of(data)
    try:
        return _KINDS[kind](data)
    except InputError:
        raise
    except Exception as error:  # the libraries raise bare Exception and RuntimeError for damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"damaged {kind} tokenizer ({reason}); copy the file again") from error


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Opens a tokenizer file of any known kind.

    Raises:
        InputError: the file does not exist or is not a tokenizer.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"tokenizer {path} is not a file; give a SentencePiece, tiktoken or tokenizer.json file")
    try:
        tokenizer = from_bytes(path.read_bytes())
    except InputError as error:
        raise InputError(f"tokenizer {path}: {error}") from error
    if isinstance(tokenizer, HuggingFaceTokenizer) and (eos := _eos_beside(path.parent)):
        tokenizer.end_with(eos)
    return tokenizer


def _eos_beside(folder: Path) -> str | None:
    """Returns the token that ends a text, from the first of transformers' files beside a tokenizer.json that names one;
    None if none does.
    """
    for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        try:
            said = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
        except ValueError as error:
            raise InputError(f"{path} is not JSON ({error}); correct it, or move the tokenizer elsewhere") from error
        text = token_text(said.get("eos_token") if isinstance(said, dict) else None)
        if text is not None:
            return text
    return None


def token_text(value: Any) -> str | None:
    """Returns the text of a token in tokenizer_config.json, given as a string or as an object with the text as
    content.
    """
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
