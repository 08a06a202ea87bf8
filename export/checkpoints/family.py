"""The description of a model family, and the functions that descriptions share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from export.checkpoints.checkpoint import Storage

Settings = Mapping[str, Any]
"""The content of config.json."""

Key = str | tuple[str, Callable[[Any], Any]] | Callable[[Settings], Any]
"""A key of config.json, alone or with a function that converts its value to that of the ModelConfig field; or a
function of all keys.
"""


def value_of(settings: Settings, key: Key) -> Any:
    """Returns the value of a ModelConfig field."""
    if isinstance(key, str):
        return settings[key]
    if callable(key):
        return key(settings)
    name, convert = key
    return convert(settings[name])


def no_layer(settings: Settings, layer: int) -> bool:
    """Returns that a block sees the whole text."""
    return False


def every_layer(settings: Settings, layer: int) -> bool:
    """Returns that a block is local."""
    return True


def all_but_every_nth(settings: Settings, layer: int) -> bool:
    """Returns whether a block is local where one in `sliding_window_pattern` blocks, the last of each group, is not."""
    return bool((layer + 1) % settings["sliding_window_pattern"])


def always_rotates(settings: Settings, layer: int, local: bool) -> bool:
    """Returns that a block has rotary embedding."""
    return True


def rotates_if_local(settings: Settings, layer: int, local: bool) -> bool:
    """Returns whether a block has rotary embedding where only local blocks have it."""
    return local


@dataclass(frozen=True)
class Family:
    """The differences between one model family and the others.

    Attributes:
        keys: maps fields of ModelConfig to keys of config.json.
        storage: storage of the weights: their names and layout.
        defaults: default values of keys that config.json omits.
        features: values of ModelConfig fields that all models of the family share.
        only: the supported values of each key; any other value would change the result, and is refused.
        local: returns whether a block attends only to the sliding window, if `layer_types` does not say.
        rotates: returns whether a block has rotary embedding, from the keys, its number, and whether it is local.
        sections: keys whose values are objects with further keys.
        other_keys: maps other names of keys, in older config.json files, to those used here.
        rope_kinds: maps the family's names of rope scaling kinds to ours.
        prefix: prefix of the weight names, unless it is missing from all of them.
        other_parts: maps other names of parts of weight names to those used here; "" for parts to leave out.
        unread: parts of the names of weights that do not belong to the language model, such as those for images.
    """

    keys: Mapping[str, Key]
    storage: Storage
    defaults: Settings
    features: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    local: Callable[[Settings, int], bool] = no_layer
    rotates: Callable[[Settings, int, bool], bool] = always_rotates
    sections: tuple[str, ...] = ()
    other_keys: Mapping[str, str] = field(default_factory=dict)
    rope_kinds: Mapping[str, str] = field(default_factory=dict)
    prefix: str = "model."
    other_parts: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu_squared",
    "xielu": "xielu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
"""Maps transformers' names of activations to ours. Its three implementations of GELU by tanh differ only in
rounding.
"""
