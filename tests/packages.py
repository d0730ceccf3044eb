"""Wheels made on the spot, for pip to take from a folder."""

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path


def add_wheel(index: Path, files: Mapping[str, str | bytes], name: str = "some_rows") -> str:
    """Put a wheel into the index and return its sha256."""
    archive = index / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    meta = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(archive, "w") as zipped:
        for path, content in {**files, **meta}.items():
            zipped.writestr(path, content)
    return hashlib.sha256(archive.read_bytes()).hexdigest()
