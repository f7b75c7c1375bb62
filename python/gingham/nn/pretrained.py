"""`save_pretrained` and `from_pretrained` for every model of the package: config.json and model.safetensors."""

import inspect
import json
from pathlib import Path
from typing import Any, Self

from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import nn

from gingham.errors import CheckpointError
from gingham.nn.checkpoint import load_state_dict, read_state_dict

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"


class PretrainedModel(PyTorchModelHubMixin, nn.Module, library_name="gingham", tags=["gingham"]):
    """A module that can be saved with its constructor's arguments and loaded from a folder or a hub repository.

    What differs from huggingface_hub's mixin: weights load strictly, errors are one line, and ``backbone_weights`` is
    not part of the saved configuration, since the saved weights take its place.
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        arguments: Any = self._hub_mixin_config
        config = {name: value for name, value in arguments.items() if name != "backbone_weights"}
        (save_directory / _CONFIG).write_text(json.dumps(config, sort_keys=True, indent=2) + "\n")
        super()._save_pretrained(save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """Load a model that `save_pretrained` wrote, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a folder, or a repository on the hub ("owner/name").
            options: arguments of the model that take the place of saved ones, and those of the hub's client
                (``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``).

        Raises:
            CheckpointError: neither a folder nor a repository that can be reached, or weights that do not fit.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            reason = str(error).strip().split("\n")[0]
            name = pretrained_model_name_or_path
            raise CheckpointError(f"{name}: neither a folder nor a repository at hand ({reason})") from error

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **options: Any,
    ) -> Self:
        if Path(model_id).is_dir():
            if not (Path(model_id) / _CONFIG).is_file():
                raise CheckpointError(f"{model_id}: no {_CONFIG} in this folder; save_pretrained writes one")
            weights = Path(model_id) / _WEIGHTS
        else:
            weights = Path(
                hf_hub_download(
                    repo_id=model_id,
                    filename=_WEIGHTS,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        unknown = sorted(options.keys() - inspect.signature(cls).parameters.keys())
        if unknown:
            raise CheckpointError(f"{cls.__name__} has no option {', '.join(unknown)}")
        model = cls(**options)
        load_state_dict(model, read_state_dict(weights), source=str(weights))
        return model.eval()
