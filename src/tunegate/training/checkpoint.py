"""Checkpoints that survive a killed pod: written whole or not at all, checked before they are trusted.

A checkpoint is a folder `step-00000120/` with `state.pt` and `manifest.json`. It is written under another name, synced
to disk, and renamed; the manifest holds the digest of the state. A damaged newest checkpoint is set aside and the one
before it is used. With a mirror every checkpoint is copied to a store as well (S3, say), and a process that starts on
another machine resumes from there.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tunegate.errors import StorageError
from tunegate.observer import NullObserver, Observer
from tunegate.storage.manifest import digest_files, list_files, sha256_file
from tunegate.training.mirror import Mirror
from tunegate.training.ranks import agreed, from_first, world

_SCHEMA = 1
_STATE = "state.pt"
_MANIFEST = "manifest.json"
_PARTIAL = ".partial-"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that passed its checks."""

    step: int
    state: dict[str, Any]
    path: Path


class CheckpointFolder:
    """The checkpoints of one training run.

    Attributes:
        root: Folder that holds them.
        fingerprint: Digest of what the run depends on (spec, data, model, seed). Checkpoints with another fingerprint
            belong to another run and are not resumed from.
        mirror: Where copies go; None keeps them in the folder alone.
    """

    def __init__(
        self,
        root: Path,
        *,
        fingerprint: str,
        keep: int = 2,
        observer: Observer | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        """Open the folder, creating it if needed.

        Args:
            root: Folder, used by one training run at a time.
            fingerprint: See the class.
            keep: How many checkpoints to keep.
            observer: Told about checkpoints that are set aside.
            mirror: Where copies go, if anywhere.

        Raises:
            StorageError: If the folder cannot be created.
        """
        self.root = root
        self.fingerprint = fingerprint
        self.keep = keep
        self.observer = observer or NullObserver()
        # Runs with other settings that use the same place must not see each other's steps.
        self.mirror = mirror.below(fingerprint[:16]) if mirror is not None else None
        try:
            root.mkdir(parents=True, exist_ok=True)
            for leftover in root.glob(f"{_PARTIAL}*") if world()[0] == 0 else ():
                shutil.rmtree(leftover)
        except OSError as error:
            raise _unwritable(root, error) from error

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write a checkpoint and drop the oldest ones beyond `keep`.

        Args:
            step: Optimizer steps done.
            state: Tensors, numbers, strings, and lists, tuples and dicts of them.

        Returns:
            The checkpoint's folder.

        Raises:
            StorageError: If the disk is full or cannot be written; older checkpoints are untouched.
        """
        target = self.root / f"step-{step:08d}"
        partial = self.root / f"{_PARTIAL}{os.getpid()}-{step}"
        try:
            partial.mkdir()
            with (partial / _STATE).open("wb") as file:
                torch.save(dict(state), file)
                file.flush()
                os.fsync(file.fileno())
            manifest = {
                "schema_version": _SCHEMA,
                "step": step,
                "fingerprint": self.fingerprint,
                "files": {
                    _STATE: {"sha256": sha256_file(partial / _STATE), "bytes": (partial / _STATE).stat().st_size}
                },
            }
            with (partial / _MANIFEST).open("w") as file_text:
                json.dump(manifest, file_text, indent=2)
                file_text.flush()
                os.fsync(file_text.fileno())
            if target.exists():  # an unusable one of the same step
                shutil.rmtree(target)
            partial.rename(target)
            _sync_folder(self.root)
            self._retire()
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            shutil.rmtree(partial, ignore_errors=True)
            raise _unwritable(self.root, error) from error
        self._copy_to_mirror(target)
        return target

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint of this run that is whole, here or in the mirror; None if there is none.

        Raises:
            StorageError: If the mirror cannot be read, or not by every node: to begin anew would throw away what may be
                there.
        """
        rank = world()[0]
        found = self._newest() if rank == 0 else None
        # One rank looks and fetches; the others read what it found.
        name = from_first(found.path.name if found is not None else None)
        if name is None:
            return None
        folder = self.root / name
        if rank != 0 and os.environ.get("LOCAL_RANK") == "0" and not folder.is_dir() and self.mirror is not None:
            self._fetch(folder)  # on a node that has not seen it
        agreed(False)  # nobody looks before every node has it
        own = found if rank == 0 else self._load(folder)
        if agreed(own is None):
            raise StorageError(
                "a node cannot read the checkpoint that rank 0 found",
                key=str(folder),
                fix="nodes that share no disk need storage.root on S3 with storage.mirror_checkpoints",
            )
        return own

    def _newest(self) -> Checkpoint | None:
        mirrored = self._mirrored()
        names = {folder.name for folder in self._folders()} | mirrored
        for name in sorted(names, reverse=True):
            folder = self.root / name
            if (found := self._load(folder)) is not None:
                return found
            if name in mirrored and self._fetch(folder) and (found := self._load(folder)) is not None:
                return found
        return None

    def _load(self, folder: Path) -> Checkpoint | None:
        """The checkpoint in a folder; None if it is not there, damaged, or another run's."""
        if folder.is_dir():
            try:
                manifest = json.loads((folder / _MANIFEST).read_text())
                if manifest["schema_version"] != _SCHEMA:
                    raise ValueError(f"schema version {manifest['schema_version']}, this is {_SCHEMA}")
                if manifest["fingerprint"] != self.fingerprint:
                    self.observer.note(f"{folder.name} belongs to a run with other settings or data; not resumed from")
                    return None
                if sha256_file(folder / _STATE) != manifest["files"][_STATE]["sha256"]:
                    raise ValueError("the digest does not match")
                state = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
                return Checkpoint(int(manifest["step"]), state, folder)
            except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
                self.observer.note(f"{folder.name} is damaged ({error}); trying the checkpoint before it")
        return None

    def _folders(self) -> list[Path]:
        return sorted((path for path in self.root.glob("step-*") if path.is_dir()), reverse=True)

    def _mirrored(self) -> set[str]:
        """Names of the checkpoints whose manifest, which goes last, is in the mirror."""
        if self.mirror is None:
            return set()
        keys = self.mirror.store.keys(f"{self.mirror.key}/")
        return {key.split("/")[-2] for key in keys if key.endswith(f"/{_MANIFEST}")}

    def _fetch(self, folder: Path) -> bool:
        """Bring a checkpoint from the mirror, in place of a damaged one here if there is one."""
        assert self.mirror is not None  # its name came from there
        partial = self.root / f"{_PARTIAL}{os.getpid()}-fetched"
        self.observer.note(f"fetching {folder.name} from {self.mirror.store.uri}/{self.mirror.key}")
        try:
            self.mirror.store.get_tree(f"{self.mirror.key}/{folder.name}", partial)
            if folder.exists():
                shutil.rmtree(folder)
            partial.rename(folder)
        except StorageError as error:
            shutil.rmtree(partial, ignore_errors=True)
            self.observer.note(f"{folder.name} cannot be fetched ({error}); trying the checkpoint before it")
            return False
        except OSError as error:
            raise _unwritable(self.root, error) from error
        return True

    def _copy_to_mirror(self, folder: Path) -> None:
        """Copy a checkpoint and drop copies beyond `keep`. An outage costs the copy, not the training."""
        if self.mirror is None:
            return
        store, base = self.mirror.store, self.mirror.key
        try:
            store.remove(f"{base}/{folder.name}")  # a damaged one of the same step
            store.put_tree(f"{base}/{folder.name}", folder)
            for name in sorted(self._mirrored(), reverse=True)[self.keep :]:
                store.remove(f"{base}/{name}")
        except StorageError as error:
            self.observer.note(f"{folder.name} was not copied to {store.uri}: {error}; training goes on")

    def _retire(self) -> None:
        """Keep the newest `keep` checkpoints of this run; those of other runs and damaged ones go."""
        kept = 0
        for folder in self._folders():
            try:
                mine = json.loads((folder / _MANIFEST).read_text())["fingerprint"] == self.fingerprint
            except (OSError, ValueError, KeyError):
                mine = False
            if mine and kept < self.keep:
                kept += 1
            else:
                shutil.rmtree(folder)


def model_digest(path: Path) -> str:
    """Digest of a model folder: its manifest's, or that of its files when nothing has published it yet."""
    manifest = path / _MANIFEST
    if manifest.is_file():
        return str(json.loads(manifest.read_text())["digest"])
    return digest_files(list_files(path))


def rng_state() -> dict[str, Any]:
    """State of every random generator that training may draw from: python, numpy, torch, CUDA."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_everything(seed: int) -> None:
    """Seed python, numpy, torch and CUDA."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unwritable(root: Path, error: BaseException) -> StorageError:
    return StorageError(
        f"a checkpoint cannot be written: {str(error).splitlines()[0]}",
        key=str(root),
        fix="free disk space (a checkpoint takes about 12 bytes a trained parameter) or give another folder",
    )
