"""open_checkpoint, which opens a checkpoint of any known layout as a ModelConfig and a lazy state dict with the names
of model.Llama.

A layout is one entry of LAYOUTS: functions that recognise it by its content and that open it. Unknown, missing or
misshapen weights are an error, which lists their names.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.checkpoints import gguf, hugging_face, llama2c, meta
from export.checkpoints.adapters import CONFIG, Adapter
from export.checkpoints.checkpoint import Checkpoint as Checkpoint
from export.checkpoints.checkpoint import read_json
from export.checkpoints.hub import download, is_hub_name
from export.checkpoints.pickled import is_torch_file
from export.checkpoints.tensor_files import is_safetensors
from model.errors import InputError

BUILT_IN = Path(__file__).parents[2] / "model" / "tiny"
"""The model that comes with the project."""


@dataclass(frozen=True)
class Layout:
    """A checkpoint layout: a function that recognises it by its content, and one that opens it.

    Attributes:
        merges: whether `open` also takes adapters to merge.
    """

    name: str
    matches: Callable[[Path], bool]
    open: Callable[..., Checkpoint]
    merges: bool = False


LAYOUTS = (
    Layout("Hugging Face folder (config.json)", hugging_face.is_folder, hugging_face.open_folder, merges=True),
    Layout("Meta folder (params.json and consolidated.NN.pth)", meta.is_folder, meta.open_folder),
    Layout("GGUF", gguf.is_gguf, gguf.open_gguf),
    Layout("safetensors file beside config.json", is_safetensors, hugging_face.open_file, merges=True),
    Layout("torch file (.pt, .pth, .bin) beside params.json or config.json", is_torch_file, meta.open_file),
    Layout("llama2.c .bin, version 1", llama2c.is_version_1, llama2c.open_version_1),
    Layout("llama2.c .bin, legacy", llama2c.is_legacy, llama2c.open_legacy),
)


def open_checkpoint(
    path: str | Path,
    hub_token: str | None = None,
    cache_dir: Path | None = None,
    adapters: Sequence[Adapter] = (),
) -> Checkpoint:
    """Opens a checkpoint of any known layout, reading only its headers.

    Args:
        path: path of a file or folder, or org/name on the Hugging Face hub.
        hub_token, cache_dir: settings for a name on the hub, see `export.checkpoints.hub.download`.
        adapters: adapters to merge into the weights of a Hugging Face checkpoint.

    Raises:
        InputError: the path does not exist, has no known layout, or its content is damaged or unsupported; the model
            cannot be downloaded from the hub; or an adapter does not fit it.
    """
    path = Path(path)
    if is_hub_name(path):
        path = download(path, hub_token, cache_dir)
    if not path.exists():
        raise InputError(f"checkpoint {path} does not exist; give a file or folder that does")
    if (path / CONFIG).is_file() and not hugging_face.is_folder(path):
        base = read_json(path / CONFIG).get("base_model_name_or_path")
        raise InputError(
            f"{path} holds a LoRA adapter of {base}; merge it first (merge_and_unload), or give --checkpoint {base} "
            f"--lora {path}"
        )
    for layout in LAYOUTS:
        if layout.matches(path):
            if adapters and not layout.merges:
                raise InputError(
                    f"--lora {adapters[0].path} needs a Hugging Face checkpoint, but {path} is of the layout "
                    f"{layout.name}; give the folder that the adapter was trained on"
                )
            try:
                return layout.open(path, adapters) if layout.merges else layout.open(path)
            except InputError:
                raise
            except ValueError as error:  # raised by ModelConfig and RopeScaling for invalid dimensions
                raise InputError(f"{path}: {error}") from error
    raise InputError(
        f"{path} is not a supported checkpoint; supported are: {', '.join(layout.name for layout in LAYOUTS)}"
    )
