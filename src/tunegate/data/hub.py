"""Data sets of the Hugging Face Hub, or in its format on disk, row by row (optional: the package `datasets`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from tunegate.data.readers import Limits, RawRow
from tunegate.errors import DataError

if TYPE_CHECKING:
    from tunegate.data.sources import Reader

_OPTIONS = ("config", "revision", "split")
_FORM = "hf://organisation/name?split=train, or hf:///folder?split=train; further options: config, revision"


@dataclass(frozen=True, slots=True)
class HubSet:
    """What a URI of this kind names."""

    name: str
    """`organisation/name`, or the path of a folder."""
    folder: bool
    split: str
    config: str | None = None
    revision: str | None = None


def parse_hub_uri(uri: str, *, base_dir: Path, key: str) -> HubSet:
    """Take a `hf://` URI apart.

    Args:
        uri: The URI; a path after `hf://` that begins with `/`, `./` or `../` is a folder.
        base_dir: What relative folders are relative to.
        key: The spec key, for errors.

    Raises:
        DataError: There is no name, no split, or an option that is not known.
    """
    parsed = urlsplit(uri)
    name = unquote(f"{parsed.netloc}{parsed.path}")
    options = dict(parse_qsl(parsed.query, keep_blank_values=True))
    unknown = sorted(options.keys() - set(_OPTIONS))
    if not name or unknown:
        reason = f"{unknown[0]!r} is no option of a Hugging Face data set" if unknown else "the data set has no name"
        raise DataError(reason, key=key, value=uri, fix=_FORM)
    folder = name.startswith(("/", "./", "../"))
    return HubSet(
        name=str((base_dir / name).absolute()) if folder else name,
        folder=folder,
        split=options.get("split") or "train",
        config=options.get("config") or None,
        revision=options.get("revision") or None,
    )


def open_hub(uri: str, *, base_dir: Path, key: str) -> Reader:
    """A reader of the rows of a data set; nothing is loaded before the first row is asked for.

    Args:
        uri: See `parse_hub_uri`.
        base_dir: What relative folders are relative to.
        key: The spec key, for errors.

    Raises:
        DataError: The URI is wrong, the folder does not exist, or the package `datasets` is not installed.
    """
    wanted = parse_hub_uri(uri, base_dir=base_dir, key=key)
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise DataError(
            "data sets in the format of Hugging Face need the package `datasets`",
            key=key,
            value=uri,
            fix="pip install 'tunegate[hub]'",
        ) from None
    if wanted.folder and not Path(wanted.name).is_dir():
        raise DataError("there is no such folder", key=key, value=uri, fix=_FORM)

    def rows(limits: Limits, key: str) -> Iterator[RawRow]:
        line = 0
        try:
            for line, value in enumerate(_load(wanted), 1):
                yield RawRow(line, value)
        except DataError:
            raise
        except Exception as error:  # the library raises whatever its readers and its network raise
            place = f" after row {line}" if line else ""
            first = (str(error).strip().splitlines() or [""])[0]
            raise DataError(
                f"the data set cannot be read{place}: {type(error).__name__}: {first[:300]}",
                key=key,
                value=uri,
                fix="check name, config, split and revision, and that the Hub can be reached (HF_TOKEN for gated sets)",
            ) from error

    return rows


def _load(wanted: HubSet) -> Any:
    """The split, as an iterable of dictionaries that reads as it goes."""
    import datasets

    if wanted.folder and ((Path(wanted.name) / "state.json").is_file() or _is_dict(Path(wanted.name))):
        # Written by `save_to_disk`: memory-mapped.
        saved = datasets.load_from_disk(wanted.name)
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if wanted.split not in saved:
            raise ValueError(f"there is no split {wanted.split!r}, only {', '.join(saved)}")
        return saved[wanted.split]
    return datasets.load_dataset(
        wanted.name, name=wanted.config, split=wanted.split, revision=wanted.revision, streaming=True
    )


def _is_dict(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file()
