"""Models of our own as folders: written whole or not at all, looked at before they are loaded."""

from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self

from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.import_utils import is_accelerate_available

from sda_fast.coords import check_int
from sda_fast.files import moved_in_when_whole
from sda_fast.hierarchy import Hierarchy
from sda_fast.weights import DTYPE, check_weights, read_config, resolve_folder

HUB_OPTIONS = ("repo_id", "commit_message", "private", "token", "create_pr")


class FolderModel(ModelMixin, ConfigMixin):
    """A model of diffusers with a folder that is safe to write, to read and to be cut off in.

    Attributes:
        role: what messages call it.
        beside: names of files that it writes beside config and weights.
    """

    config_name = "config.json"
    role: ClassVar[str] = "model"
    beside: ClassVar[Collection[str]] = ()

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> None:
        """Refuse arguments of a wrong type or size; other keys pass.

        Raises:
            ValueError: one cannot be; the message names it.
        """

    def save_beside(self, folder: Path) -> None:
        """Write the files of ``beside`` that there are."""

    def load_beside(self, folder: Path) -> None:
        """Read what ``save_beside`` wrote."""

    # pyrefly: ignore[bad-override]
    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Write config.json, the weights and what belongs beside them.

        All is written into a scratch folder in there first: if that fails, an earlier save stays
        as it was. A folder holds one save, of whatever variant; other files in it stay.

        Args:
            save_directory: created if it is not there.
            kwargs: of ``ModelMixin.save_pretrained``; with ``is_main_process=False`` nothing is
                written.

        Raises:
            ValueError: ``safe_serialization=False``: no pickle is written.
            OSError: it is a file, or something cannot be written.
        """
        if not kwargs.get("safe_serialization", True):
            raise ValueError("safe_serialization must stay True: no pickle is written")
        if not kwargs.get("is_main_process", True):
            return
        upload = kwargs.pop("push_to_hub", False)
        about = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        with moved_in_when_whole(save_directory, str(self.config_name), self._writes) as scratch:
            super().save_pretrained(scratch, **kwargs)
            self.save_beside(scratch)
        if upload:  # last: a hub out of reach must not cost the save
            about.setdefault("repo_id", Path(save_directory).resolve().name)
            self.push_to_hub(**about, variant=kwargs.get("variant"))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str] | None, **kwargs: Any
    ) -> Self:
        """Load what ``save_pretrained`` wrote; encoders are attached afterwards.

        Args:
            pretrained_model_name_or_path: a folder or a hub id.
            kwargs: of ``ModelMixin.from_pretrained``: ``dtype`` or ``torch_dtype``, ``subfolder``,
                ``local_files_only``, ``device_map`` ...

        Raises:
            ValueError: the config is another model's, the weights are pickled, truncated or
                foreign, or they do not fit the config.
            OSError: there is no such folder, or the hub is out of reach.
        """
        path = pretrained_model_name_or_path
        if path is None:
            raise ValueError("pretrained_model_name_or_path must be a folder or a hub id, got None")
        folder = resolve_folder(path, cls.role, kwargs.pop("local_files_only", None) or False)
        folder = folder / (kwargs.pop("subfolder", None) or "")
        cls._check_folder(folder)
        given = [kwargs.pop(name, None) for name in ("dtype", "torch_dtype")]
        kwargs[DTYPE] = given[1] if given[0] is None else given[0]
        kwargs.setdefault("low_cpu_mem_usage", is_accelerate_available())
        try:
            model, info = super().from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **kwargs
            )
        except (RuntimeError, ValueError) as error:  # a size mismatch is either of them
            raise cls._misfit(folder, error) from error
        faults = {name: found for name, found in info.items() if found}
        if faults:
            raise cls._misfit(folder, faults)
        model.register_to_config(_name_or_path=str(path) if not Path(path).exists() else "")
        model.load_beside(folder)
        return model

    @classmethod
    def _check_folder(cls, folder: Path) -> None:
        """Refuse a folder that holds another model or unsafe or torn weights."""
        config = read_config(folder, cls.role)
        check_class(config, cls.__name__, cls.role, folder)
        try:
            cls.check_config(config)
        except ValueError as error:
            raise ValueError(f"{cls.role}: {folder / 'config.json'}: {error}") from error
        check_weights(folder, cls.role, beside=cls.beside)

    @classmethod
    def _writes(cls, name: str) -> bool:
        """Whether ``save_pretrained`` writes files of that name, in any variant or number."""
        weights = name.startswith("diffusion_pytorch_model") and ".safetensors" in name
        return weights or name in cls.beside

    @classmethod
    def _misfit(cls, folder: Path, reason: object) -> ValueError:
        return ValueError(
            f"{cls.role}: {folder} holds weights that do not fit its config: {reason}"[:600]
        )


def check_class(config: Mapping[str, Any], name: str, role: str, folder: Path) -> None:
    """See that a folder's config is that of a class.

    Raises:
        ValueError: it is another one's.
    """
    found = config.get("_class_name")
    if found != name:
        raise ValueError(
            f"{role}: {folder} must hold the model {name}, got the config of {found!r}"
        )


def check_sizes(config: Mapping[str, Any], sizes: Collection[str]) -> None:
    """Refuse a hierarchy that cannot be, and sizes that are no integer of at least 1.

    Args:
        config: arguments of a model, tokens_per_node among them; other keys pass.
        sizes: names of sizes.

    Raises:
        ValueError: one cannot be; the message names it.
    """
    for name, value in config.items():
        if name == "tokens_per_node":
            Hierarchy(value)
        elif name in sizes:
            check_int(name, value, least=1)
