"""open_checkpoint(path): any known layout becomes a ModelConfig and a lazy state dict with model.Llama's names.

A layout is one entry of LAYOUTS: how to recognise it from content, and how to open it. Nothing is guessed from a
file's name, and a weight that is unknown, missing or misshapen is an error that lists the names.
"""

import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import ModelConfig, RopeScaling
from model.errors import InputError, listed
from model.model import Llama

BUILT_IN = Path(__file__).parent / "tiny"
"""The model that comes with the project."""


class LazyWeights(Mapping[str, Tensor]):
    """Name -> tensor, read from storage each time it is asked for and never kept."""

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been opened and checked, its weights still on storage.

    Attributes:
        config: the model's dimensions.
        weights: lazy state dict of `model.model.Llama`, in the file's own dtype.
        files: what the content consists of, for `digest`.
        layout: the layout's name in LAYOUTS.
        bos_id: the id that starts a text, where the checkpoint says so.
        stop_ids: the ids that end a text, where the checkpoint says so.
        tokenizer: the tokenizer file that belongs to the layout, where there is one.
    """

    config: ModelConfig
    weights: Mapping[str, Tensor]
    files: tuple[Path, ...]
    layout: str
    bos_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    tokenizer: Path | None = None

    def digest(self) -> str:
        """XXH3-128 over the content of all files, in hex: equal checkpoints have equal digests wherever they lie."""
        state = xxhash.xxh3_128()
        for file in self.files:
            with file.open("rb") as stream:
                while piece := stream.read(1 << 24):
                    state.update(piece)
        return state.hexdigest()

    def build(self) -> Llama:
        """The eager float32 model. float32 weights that need no reordering stay mapped.

        A tied head is a parameter of its own over the embedding's memory: a graph can then hand it to a backend.
        """
        with torch.device("meta"):
            model = Llama(self.config)
        state = {name: tensor.float() for name, tensor in self.weights.items()}
        if self.config.tied:
            state["output.weight"] = state["tok_embeddings.weight"]
        model.load_state_dict(state, assign=True)
        return model.eval().requires_grad_(False)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight that a checkpoint of this config must hold."""
    with torch.device("meta"):
        state = Llama(config).state_dict()
    return {name: tuple(t.shape) for name, t in state.items() if not (config.tied and name == "output.weight")}


def half_split(weight: Tensor, n_heads: int) -> Tensor:
    """Reorders the rows of wq or wk, [n*Dh, D], from interleaved rotary pairs (2i, 2i+1) to (i, i + Dh/2)."""
    rows, dim = weight.shape
    return weight.view(n_heads, rows // n_heads // 2, 2, dim).transpose(1, 2).reshape(rows, dim)


# --- llama2.c .bin ---------------------------------------------------------------------------------------------------

_VERSION_1_MAGIC = 0x616B3432  # "ak42"
_VERSION_1_HEADER = 256
_LEGACY_HEADER = 28

_LAYER_MATRICES = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
_FEED_FORWARD = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
_LEGACY_ORDER = (
    "tok_embeddings",
    "layers.*.attention_norm",
    *(f"layers.*.{name}" for name in _LAYER_MATRICES),
    "layers.*.ffn_norm",
    *(f"layers.*.{name}" for name in _FEED_FORWARD),
    "norm",
    "(freq_cis)",
    "output",
)
_VERSION_1_ORDER = (
    "layers.*.attention_norm",
    "layers.*.ffn_norm",
    "norm",
    "tok_embeddings",
    *(f"layers.*.{name}" for name in _LAYER_MATRICES),
    *(f"layers.*.{name}" for name in _FEED_FORWARD),
    "output",
)


def _read_head(path: Path, size: int) -> bytes:
    with path.open("rb") as stream:
        return stream.read(size)


def _is_version_1(path: Path) -> bool:
    head = _read_head(path, 8)
    return len(head) == 8 and struct.unpack("<I", head[:4])[0] == _VERSION_1_MAGIC


def _is_legacy(path: Path) -> bool:
    """Seven plausible dimensions at the start: the legacy layout has no magic number."""
    head = _read_head(path, _LEGACY_HEADER)
    if len(head) < _LEGACY_HEADER:
        return False
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", head)
    sizes_fit = 0 < layers <= 1024 and 0 < kv_heads <= heads <= dim <= 1 << 17 and 0 < hidden <= 1 << 20
    return sizes_fit and dim % heads == 0 and 0 < abs(vocab) <= 1 << 22 and 0 < context <= 1 << 24


def _open_version_1(path: Path) -> Checkpoint:
    head = _read_head(path, _VERSION_1_HEADER)
    if len(head) < _VERSION_1_HEADER:
        raise InputError(f"{path} is truncated: {len(head)} bytes hold no llama2.c header; copy the file again")
    version = struct.unpack("<i", head[4:8])[0]
    if version != 1:
        raise InputError(f"{path} is a llama2.c file of version {version}; export it again as version 1 (float32)")
    config = _llama2c_config(struct.unpack("<7i", head[8:36]), tied=bool(head[36]))
    return _open_llama2c(path, config, _VERSION_1_ORDER, _VERSION_1_HEADER)


def _open_legacy(path: Path) -> Checkpoint:
    dims = struct.unpack("<7i", _read_head(path, _LEGACY_HEADER))
    return _open_llama2c(path, _llama2c_config(dims, tied=dims[5] > 0), _LEGACY_ORDER, _LEGACY_HEADER)


def _llama2c_config(dims: tuple[int, ...], tied: bool) -> ModelConfig:
    dim, hidden, layers, heads, kv_heads, vocab, context = dims
    return ModelConfig(
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=dim // max(heads, 1),
        hidden_dim=hidden,
        vocab_size=abs(vocab),
        context=context,
        tied=tied,
    )


def _open_llama2c(path: Path, config: ModelConfig, order: Iterable[str], header: int) -> Checkpoint:
    """float32 tensors one after another in `order`, a starred name once per layer."""
    shapes = expected_shapes(config)
    offset, offsets = header, {}
    for pattern in order:
        if pattern == "(freq_cis)":
            offset += 2 * config.context * (config.head_dim // 2) * 4
            continue
        for layer in range(config.n_layers) if "*" in pattern else (0,):
            name = pattern.replace("*", str(layer)) + ".weight"
            if name in shapes:
                offsets[name] = offset
                offset += int(np.prod(shapes[name])) * 4
    size = path.stat().st_size
    if size != offset:
        problem = "truncated" if size < offset else "too long"
        raise InputError(f"{path} is {problem}: {size} bytes where its dimensions need {offset}; copy the file again")

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            mapped = np.memmap(path, np.float32, mode="c", offset=offsets[name], shape=shapes[name])
            tensor = torch.from_numpy(mapped)
            if name.endswith("wq.weight"):
                return half_split(tensor, config.n_heads)
            return half_split(tensor, config.n_kv_heads) if name.endswith("wk.weight") else tensor

        return read

    # llama2.c was trained with BOS between stories and stops there; its tokenizers have BOS 1 and EOS 2.
    weights = LazyWeights({name: reader(name) for name in shapes})
    return Checkpoint(config, weights, (path,), "llama2.c", bos_id=1, stop_ids=(1, 2))


# --- Hugging Face folder ---------------------------------------------------------------------------------------------

HUGGING_FACE_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.*.attention_norm.weight": "model.layers.*.input_layernorm.weight",
    "layers.*.attention.wq.weight": "model.layers.*.self_attn.q_proj.weight",
    "layers.*.attention.wk.weight": "model.layers.*.self_attn.k_proj.weight",
    "layers.*.attention.wv.weight": "model.layers.*.self_attn.v_proj.weight",
    "layers.*.attention.wo.weight": "model.layers.*.self_attn.o_proj.weight",
    "layers.*.ffn_norm.weight": "model.layers.*.post_attention_layernorm.weight",
    "layers.*.feed_forward.w1.weight": "model.layers.*.mlp.gate_proj.weight",
    "layers.*.feed_forward.w2.weight": "model.layers.*.mlp.down_proj.weight",
    "layers.*.feed_forward.w3.weight": "model.layers.*.mlp.up_proj.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
"""Our name -> Hugging Face's, a star standing for the layer's number."""

_ROTARY_BUFFER = "rotary_emb.inv_freq"  # old checkpoints carry it; it follows from the config


def renamed(name: str, table: Mapping[str, str]) -> str:
    """Translates a weight's name by a starred table, either way round."""
    parts = name.split(".")
    layer = next((part for part in parts if part.isdigit()), "")
    pattern = ".".join("*" if part.isdigit() else part for part in parts)
    return table[pattern].replace("*", layer)


def _is_hugging_face(path: Path) -> bool:
    return path.is_dir() and (path / "config.json").is_file()


def _open_hugging_face(path: Path) -> Checkpoint:
    settings = _read_json(path / "config.json")
    config = _hugging_face_config(settings, path / "config.json")
    files = _safetensors_files(path)
    sources = _index_safetensors(files)

    shapes = expected_shapes(config)
    wanted = {renamed(name, HUGGING_FACE_NAMES): name for name in shapes}
    spare = {name for name in sources if name.endswith(_ROTARY_BUFFER)}
    if config.tied and HUGGING_FACE_NAMES["output.weight"] in sources:
        spare.add(HUGGING_FACE_NAMES["output.weight"])  # Hugging Face ties over it, whatever it holds
    if missing := wanted.keys() - sources.keys():
        raise InputError(f"{path} lacks the weights {listed(missing)}; download the checkpoint again")
    if unknown := sources.keys() - wanted.keys() - spare:
        raise InputError(
            f"{path} holds weights that no plain Llama has: {listed(unknown)}; its family is not supported"
        )
    for source, name in wanted.items():
        if sources[source].shape != shapes[name]:
            raise InputError(
                f"{source} in {path} is {list(sources[source].shape)} where config.json asks for "
                f"{list(shapes[name])}; the two files are not of one checkpoint"
            )
    weights = LazyWeights({name: sources[source].read for source, name in wanted.items()})
    generation = path / "generation_config.json"
    ids = settings | (_read_json(generation) if generation.is_file() else {})
    stop = ids.get("eos_token_id")
    return Checkpoint(
        config,
        weights,
        (path / "config.json", *files),
        "hugging-face",
        bos_id=ids.get("bos_token_id"),
        stop_ids=tuple(stop) if isinstance(stop, list) else () if stop is None else (stop,),
        tokenizer=next((p for p in (path / "tokenizer.json", path / "tokenizer.model") if p.is_file()), None),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON ({error}); download the checkpoint again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__} where an object belongs; download it again")
    return content


def _hugging_face_config(settings: dict[str, Any], path: Path) -> ModelConfig:
    architectures = settings.get("architectures") or []
    if architectures != ["LlamaForCausalLM"]:
        raise InputError(f"{path} names the architecture {architectures}; only LlamaForCausalLM can be exported so far")
    for key, plain in {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}.items():
        if settings.get(key, plain) != plain:
            raise InputError(f"{path} sets {key} to {settings[key]!r}; only {plain!r} can be exported so far")
    try:
        heads, dim = settings["num_attention_heads"], settings["hidden_size"]
        theta, scaling = _hugging_face_rope(settings, path)
        return ModelConfig(
            dim=dim,
            n_layers=settings["num_hidden_layers"],
            n_heads=heads,
            n_kv_heads=settings.get("num_key_value_heads") or heads,
            head_dim=settings.get("head_dim") or dim // heads,
            hidden_dim=settings["intermediate_size"],
            vocab_size=settings["vocab_size"],
            context=settings["max_position_embeddings"],
            norm_eps=settings.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tied=settings.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise InputError(f"{path} lacks the key {error}; download the checkpoint again") from error
    except (TypeError, ZeroDivisionError) as error:
        raise InputError(f"{path} holds a dimension that is no number ({error}); download it again") from error


def _hugging_face_rope(settings: dict[str, Any], path: Path) -> tuple[float, RopeScaling | None]:
    """Reads both spellings: `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling`."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", settings.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise InputError(f"{path} asks for rope scaling {kind!r}; only 'default' and 'llama3' can be exported so far")
    return theta, RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_context=rope["original_max_position_embeddings"],
    )


@dataclass(frozen=True)
class _SafetensorsEntry:
    file: Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        with safe_open(self.file, "pt") as tensors:
            return tensors.get_tensor(self.name)


def _safetensors_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        if not (path / "model.safetensors").is_file():
            raise InputError(f"{path} holds neither model.safetensors nor its index; download the checkpoint again")
        return [path / "model.safetensors"]
    names = sorted(set(_read_json(index).get("weight_map", {}).values()))
    if absent := [name for name in names if not (path / name).is_file()]:
        raise InputError(f"{path} lacks {listed(absent)}, which its index names; download the checkpoint again")
    return [path / name for name in names]


def _index_safetensors(files: Iterable[Path]) -> dict[str, _SafetensorsEntry]:
    entries: dict[str, _SafetensorsEntry] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    if name in entries:
                        raise InputError(f"{name} stands in both {entries[name].file.name} and {file.name}")
                    entries[name] = _SafetensorsEntry(file, name, tuple(tensors.get_slice(name).get_shape()))
        except SafetensorError as error:
            raise InputError(f"{file} is truncated or no safetensors file ({error}); download it again") from error
    return entries


# --- all layouts -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How to recognise a layout from content, and how to open it."""

    name: str
    matches: Callable[[Path], bool]
    open: Callable[[Path], Checkpoint]


LAYOUTS = (
    Layout("Hugging Face folder (config.json and .safetensors)", _is_hugging_face, _open_hugging_face),
    Layout("llama2.c .bin, version 1", lambda path: path.is_file() and _is_version_1(path), _open_version_1),
    Layout("llama2.c .bin, legacy", lambda path: path.is_file() and _is_legacy(path), _open_legacy),
)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a checkpoint of any known layout, reading only its headers.

    Raises:
        InputError: the path does not exist, is of no known layout, or its content is damaged or unsupported.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"checkpoint {path} does not exist; give a file or folder that does")
    for layout in LAYOUTS:
        if layout.matches(path):
            try:
                return layout.open(path)
            except InputError:
                raise
            except ValueError as error:  # ModelConfig and RopeScaling refuse impossible dimensions
                raise InputError(f"{path}: {error}") from error
    raise InputError(f"{path} is no known checkpoint; known are: {', '.join(layout.name for layout in LAYOUTS)}")
