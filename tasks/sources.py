"""Where assets come from: `folder:PATH`, `procedural:COUNT`, `objaverse:UIDS`, `shapenet:PATH`.

`open_source(spec)` returns a Source: `assets()` lists, `load(asset)` reads one. Sources are small
and picklable: they travel to Ray workers, which load; the driver lists.
"""

import csv
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tasks.mesh import Mesh, MeshRejectedError
from tasks.mesh_io import EXTENSIONS, ReadLimits, read_mesh, referenced_files
from tasks.mesh_parts import inside_root
from tasks.procedural import FAMILIES, procedural_bytes

UNKNOWN = "unknown"
DEFAULT_LIMITS = ReadLimits()


class SourceError(ValueError):
    """A source that can't be opened or listed; the message says what to do."""


@dataclass(frozen=True)
class SourceAsset:
    """One asset of a source.

    uri: its name within the source, stable from one listing to the next.
    asset_id: SHA-256 (hex) over the bytes of the file, then of each file that it references. For
        a file that can't be read: over `unreadable` and the uri, so that it is still one row.
    size: of all these bytes.
    """

    uri: str
    asset_id: str
    size: int
    licence: str = UNKNOWN
    category: str = UNKNOWN
    attribution: str = ""


class Source(Protocol):
    """What every source offers."""

    def assets(self) -> Iterator[SourceAsset]:
        """List the assets, in a stable order."""
        ...

    def load(self, asset: SourceAsset) -> Mesh:
        """Read an asset; raises MeshRejectedError, `changed` when it is not the one listed."""
        ...


def open_source(
    spec: str, licences: Iterable[str] | None = None, limits: ReadLimits = DEFAULT_LIMITS
) -> Source:
    """Return the source that spec names.

    folder:PATH            every mesh file below PATH; PATH/manifest.csv may describe them
    procedural:COUNT       parametric objects of the seeds 0 to COUNT - 1
    objaverse:UIDS         a file with one uid a line, or uids with commas between
    shapenet:PATH          PATH/<synset>/<model>/models/model_normalized.obj
    licences: keep only assets under one of these, spelled as the source spells them.
    Raises SourceError.
    """
    kind, _, rest = spec.partition(":")
    allowed = None if licences is None else frozenset(licences)
    match kind:
        case "folder" if rest:
            return FolderSource(existing_folder(rest), allowed, limits)
        case "shapenet" if rest:
            return ShapeNetSource(existing_folder(rest), allowed, limits)
        case "procedural" if rest.isdecimal() and int(rest) > 0:
            return ProceduralSource(int(rest), allowed, limits)
        case "objaverse" if rest:
            return ObjaverseSource(objaverse_uids(rest), allowed, limits)
    raise SourceError(
        f"source {spec!r}; expected folder:PATH, procedural:COUNT with COUNT > 0, "
        "objaverse:UIDS or shapenet:PATH"
    )


def absolute_spec(spec: str) -> str:
    """Return a spec that means the same in a process with another working directory."""
    kind, _, rest = spec.partition(":")
    path = Path(rest).expanduser()
    return f"{kind}:{path.absolute()}" if kind != "procedural" and path.exists() else spec


def existing_folder(text: str) -> Path:
    """Return an absolute folder; raises SourceError when there is none."""
    path = Path(text).expanduser().absolute()
    if not path.is_dir():
        raise SourceError(f"{text!r} is no folder; give the path of an existing one")
    return path


def identify(path: Path, root: Path, uri: str, limits: ReadLimits) -> tuple[str, int]:
    """Return SHA-256 (hex) and size of a mesh file and of what it references."""
    try:
        if path.stat().st_size > limits.file_bytes:
            raise OSError(f"larger than {limits.file_bytes} bytes")
        digest, size = hashlib.sha256(), 0
        for file in (path, *referenced_files(path, root, limits)):
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
                    size += len(chunk)
    except OSError:
        return hashlib.sha256(b"unreadable\0" + uri.encode(errors="surrogateescape")).hexdigest(), 0
    return digest.hexdigest(), size


def load_file(path: Path, root: Path, asset: SourceAsset, limits: ReadLimits) -> Mesh:
    """Read a listed file; rejects one that is no longer there (`gone`) or differs (`changed`)."""
    if not path.exists():
        raise MeshRejectedError("gone", f"{asset.uri} was there when the source was listed")
    found, _ = identify(path, root, asset.uri, limits)
    if found != asset.asset_id:
        raise MeshRejectedError("changed", f"{asset.uri} changed since the source was listed")
    return read_mesh(path, root, limits)


@dataclass(frozen=True)
class FolderSource:
    """Every mesh file at any depth of a folder.

    Hidden files and folders (and `__MACOSX`) are no assets. Symbolic links count only where they
    stay inside the folder, and folders are entered through their real path alone.
    """

    root: Path
    licences: frozenset[str] | None = None
    limits: ReadLimits = field(default_factory=ReadLimits)

    def paths(self) -> Iterator[Path]:
        """Yield the mesh files, sorted within each folder."""
        for folder, folders, files in os.walk(self.root, onerror=self.not_listed):
            folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__MACOSX")
            for name in sorted(files):
                path = Path(folder, name)
                if path.suffix.lower() not in EXTENSIONS or name.startswith("."):
                    continue
                if inside_root(path, self.root) and (path.is_file() or not path.exists()):
                    yield path

    def not_listed(self, error: OSError) -> None:
        """Stop: a folder that can't be listed would make its assets look deleted."""
        raise SourceError(f"{error.filename}: {error.strerror}; make it readable, or hide it")

    def assets(self) -> Iterator[SourceAsset]:
        """List the mesh files with licence, attribution and category of the manifest."""
        manifest = read_manifest(self.root / "manifest.csv")
        for path in self.paths():
            uri = path.relative_to(self.root).as_posix()
            row = manifest.get(uri, {})
            licence = row.get("licence") or UNKNOWN
            if self.licences is None or licence in self.licences:
                asset_id, size = identify(path, self.root, uri, self.limits)
                category, by = row.get("category") or UNKNOWN, row.get("attribution") or ""
                yield SourceAsset(uri, asset_id, size, licence, category, by)

    def load(self, asset: SourceAsset) -> Mesh:
        """Read the file; it must be the one that was listed."""
        return load_file(self.root / asset.uri, self.root, asset, self.limits)


def read_manifest(path: Path) -> dict[str, dict[str, str]]:
    """Return the rows of a manifest by their `file`; none without the file.

    Raises SourceError when it can't be read or has no such column.
    """
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = csv.DictReader(stream)
            if "file" not in (rows.fieldnames or ()):
                raise SourceError(
                    f"{path} has columns {rows.fieldnames}; it needs one named `file`"
                )
            return {row["file"]: row for row in rows}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{path}: {error}; repair or remove it") from error


@dataclass(frozen=True)
class ShapeNetSource:
    """ShapeNetCore as it is unpacked: the category is the taxonomy id, the first folder's name."""

    root: Path
    licences: frozenset[str] | None = None
    limits: ReadLimits = field(default_factory=ReadLimits)

    def assets(self) -> Iterator[SourceAsset]:
        """List the models; they may reference files of their own model's folder only."""
        if self.licences is not None and "ShapeNet" not in self.licences:
            return
        for path in sorted(self.root.glob("*/*/models/model_normalized.obj")):
            synset, model = path.relative_to(self.root).parts[:2]
            if inside_root(path, self.root):
                uri = f"{synset}/{model}"
                asset_id, size = identify(path, self.root / uri, uri, self.limits)
                yield SourceAsset(uri, asset_id, size, "ShapeNet", synset, "ShapeNet")

    def load(self, asset: SourceAsset) -> Mesh:
        """Read a model."""
        folder = self.root / asset.uri
        path = folder / "models" / "model_normalized.obj"
        return load_file(path, folder, asset, self.limits)


@dataclass(frozen=True)
class ProceduralSource:
    """Parametric objects; the asset of a seed is the same on every machine."""

    count: int
    licences: frozenset[str] | None = None
    limits: ReadLimits = field(default_factory=ReadLimits)

    def assets(self) -> Iterator[SourceAsset]:
        """List the seeds 0 to count - 1."""
        if self.licences is not None and "CC0-1.0" not in self.licences:
            return
        for seed in range(self.count):
            data = procedural_bytes(seed)
            asset_id, family = hashlib.sha256(data).hexdigest(), FAMILIES[seed % len(FAMILIES)]
            yield SourceAsset(
                str(seed), asset_id, len(data), "CC0-1.0", family.__name__, "Gigashape"
            )

    def load(self, asset: SourceAsset) -> Mesh:
        """Generate the object's file, and read it as any other file."""
        data = procedural_bytes(int(asset.uri))
        if hashlib.sha256(data).hexdigest() != asset.asset_id:
            detail = "another version of the generator; list the source again"
            raise MeshRejectedError("changed", detail)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{asset.uri}.ply")
            path.write_bytes(data)
            return read_mesh(path, Path(folder), self.limits)


def objaverse_uids(text: str) -> tuple[str, ...]:
    """Return the uids of a file with one a line, or of a list with commas."""
    path = Path(text).expanduser()
    found = path.read_text().split() if path.is_file() else text.split(",")
    uids = tuple(dict.fromkeys(uid.strip() for uid in found if uid.strip()))
    if not uids or not all(uid.isalnum() for uid in uids):
        raise SourceError(f"objaverse:{text}: neither a file of uids nor uids with commas between")
    return uids


@dataclass(frozen=True)
class ObjaverseSource:
    """Objects of Objaverse 1.0 through the `objaverse` package, which downloads and caches them."""

    uids: tuple[str, ...]
    licences: frozenset[str] | None = None
    limits: ReadLimits = field(default_factory=ReadLimits)

    def assets(self) -> Iterator[SourceAsset]:
        """List the objects under an allowed licence (`by`, `cc0`, ...); the id takes a download."""
        objaverse = import_objaverse()
        annotations = online(objaverse.load_annotations, list(self.uids))
        for uid in self.uids:
            if uid not in annotations:
                raise SourceError(f"Objaverse has no object {uid!r}; take it off the list")
            about = annotations[uid]
            licence = about.get("license") or UNKNOWN
            if self.licences is not None and licence not in self.licences:
                continue
            path = self.path(uid)
            asset_id, size = identify(path, path.parent, uid, self.limits)
            names = [c.get("name") for c in about.get("categories") or [] if c.get("name")]
            category, by = names[0] if names else UNKNOWN, about.get("user", {})
            author = by.get("displayName") or by.get("username") or ""
            yield SourceAsset(uid, asset_id, size, licence, category, author)

    def path(self, uid: str) -> Path:
        """Return the object's file in the package's cache, downloaded if it is not there."""
        paths = online(import_objaverse().load_objects, [uid])
        if uid not in paths:
            raise SourceError(f"Objaverse has no object {uid!r}; take it off the list")
        return Path(paths[uid])

    def load(self, asset: SourceAsset) -> Mesh:
        """Read an object, downloading it on a machine that has not got it."""
        path = self.path(asset.uri)
        return load_file(path, path.parent, asset, self.limits)


def import_objaverse() -> Any:
    """Return the package, which only this source needs; raises SourceError without it."""
    try:
        import objaverse
    except ImportError as error:
        raise SourceError(
            "objaverse: sources need the `objaverse` package: pip install 'gigashape[objaverse]'"
        ) from error
    return objaverse


def online(call: Any, uids: list[str]) -> dict[str, Any]:
    """Call the package, with a message for a machine without a network."""
    try:
        return call(uids)
    except OSError as error:  # urllib's errors are OSErrors
        raise SourceError(
            f"Objaverse can't be reached ({error}); it needs huggingface.co unless its cache, "
            "~/.objaverse, holds the objects: download there and use folder:PATH"
        ) from error
