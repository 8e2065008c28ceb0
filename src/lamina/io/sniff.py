"""What kind of file is this? By its content, never by its extension."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from .._core.errors import FileError
from .gguf import open_gguf
from .npz import open_npy, open_npz
from .safetensors import open_safetensors
from .sharded import open_directory, open_index
from .tensorfile import FileBytes, TensorFile
from .torch_legacy import open_torch_legacy
from .torch_tar import open_torch_tar
from .torch_zip import open_torch_zip
from .zip_records import read_directory

__all__ = ["OPENERS", "kind_of", "open_any"]

_LEGACY_TORCH = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
}
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<error")

OPENERS: dict[str, Callable[[str], TensorFile]] = {
    "safetensors": open_safetensors,
    "npz": open_npz,
    "npy": open_npy,
    "torch-zip": open_torch_zip,
    "torch-legacy": open_torch_legacy,
    "torch-tar": open_torch_tar,
    "gguf": open_gguf,
}


def open_any(path: str | os.PathLike[str]) -> TensorFile:
    """Open a file of any kind that we read, an index of shards, or a directory with one of them.

    Args:
        path: the file or directory.

    Returns:
        The lazy mapping; ``kind`` says what it was.

    Raises:
        FileNotFoundError: if there is nothing there.
        FileError: if it is damaged or of no kind that we read.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        return open_directory(path, _open_single)
    kind = kind_of(path)
    if kind == "sharded":
        return open_index(path, _open_single)
    return OPENERS[kind](path)


def _open_single(path: str) -> TensorFile:
    kind = kind_of(path)
    if kind == "sharded":
        raise FileError(f"{path}: is an index of shards itself, expected a file of tensors")
    return OPENERS[kind](path)


def kind_of(path: str | os.PathLike[str]) -> str:
    """Return the kind of a file: a key of ``OPENERS``, or ``"sharded"`` for an index.

    Raises:
        FileError: saying what the file is, and what to do, if it is nothing that we read.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp(), "model.safetensors")
        >>> _ = path.write_text("version https://git-lfs.github.com/spec/v1")
        >>> kind_of(path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        lamina._core.errors.FileError: ... is a git-lfs pointer, not the file itself; run: ...
    """
    source = FileBytes(path)
    try:
        head = source.pread(512, 0)
        if head[:4] in (b"PK\3\4", b"PK\5\6") and not _is_safetensors(head):
            return _zip_kind(source)
        return _kind(source.path, head, source)
    finally:
        source.close()


def _kind(path: str, head: bytes, source: FileBytes) -> str:
    refuse = partial(_refuse, path)
    if not head:
        raise refuse("is empty; the download or the save did not finish")
    if _is_safetensors(head):
        return "safetensors"
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith(b"GGUF"):
        return "gguf"
    if head.startswith(_LEGACY_TORCH):
        return "torch-legacy"
    if head[257:262] == b"ustar":
        return "torch-tar"
    if len(head) > 1 and head[0] == 0x80 and 2 <= head[1] <= 5:
        raise refuse(
            "is a plain pickle, which can run any code when it is loaded; load it where you trust "
            "it, and save the arrays with lamina.save or torch.save"
        )
    if head.startswith(b"\x89HDF"):
        raise refuse("is an HDF5 file; read it with h5py, and save the arrays with lamina.save")
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise refuse(f"is compressed ({name}); unpack it first")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text.startswith(b"version https://git-lfs"):
        raise refuse("is a git-lfs pointer, not the file itself; run: git lfs pull")
    if text[:16].lower().startswith(_PAGES):
        raise refuse("is a web page, not a model; the download got an error or a login page")
    if text[:1] in (b"{", b"["):
        return _json_kind(source, refuse)
    if not head.strip(b"\0"):
        raise refuse("starts with nothing but zeros; the download or the copy did not finish")
    raise refuse(f"is of no kind that lamina reads (it starts with {head[:16]!r})")


def _is_safetensors(head: bytes) -> bool:
    # The header's length is below 2**32, and JSON follows; no other magic has zeros there.
    return head[4:9] == b"\0\0\0\0{"


def _json_kind(source: FileBytes, refuse: Callable[[str], FileError]) -> str:
    text = source.pread(100_000_000, 0)
    if b'"weight_map"' in text:
        return "sharded"
    if b'"error"' in text[:4096] or b'"message"' in text[:4096]:
        raise refuse("is an error message of a server, not a model; the download failed")
    raise refuse("is a JSON file, not a model")


def _zip_kind(source: FileBytes) -> str:
    data = source.buffer().data
    names = read_directory(data, source.path)
    del data
    if any(name.count("/") == 1 and name.endswith("/data.pkl") for name in names):
        return "torch-zip"
    if all(name.endswith(".npy") or name == "__lamina__.json" for name in names):
        return "npz"
    if any(name.endswith(".npy") for name in names):
        return "npz"
    shown = ", ".join(sorted(names)[:3])
    raise _refuse(source.path, f"is a zip file without tensors (it has {shown}); unpack it first")


def _refuse(path: str, reason: str) -> FileError:
    return FileError(f"{path}: {reason}")
