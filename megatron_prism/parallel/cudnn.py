"""Which cuDNN this process has loaded. Two of them in one process, of different versions, refuse each other's parts, and fused attention is lost."""

from __future__ import annotations

import re
from pathlib import Path

MAPS = Path("/proc/self/maps")


def folders(maps: Path = MAPS) -> tuple[str, ...]:
    """Return the folders from which libcudnn is loaded, in order. Empty where it is not loaded."""
    try:
        text = maps.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return ()
    return tuple(sorted({str(Path(path).parent) for path in re.findall(r"^.* (/.*/libcudnn\.so[^/\n]*)$", text, re.MULTILINE)}))


def version() -> str | None:
    """Return the version of torch's cuDNN, None without it."""
    import torch

    number = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return None if number is None else ".".join(map(str, (number // 10_000, number // 100 % 100, number % 100)))


def cure(loaded: tuple[str, ...]) -> str:
    """Return what to do where no fused attention runs: one cuDNN, that of torch; else flash-attn."""
    ours = next((folder for folder in loaded if re.search("/(site|dist)-packages/", folder)), None)
    if len(loaded) > 1:
        home = str(Path(ours).parent) if ours else "the folder of torch's own"
        return f"two cuDNNs are loaded ({', '.join(loaded)}): export CUDNN_HOME={home}, which Transformer Engine then loads too"
    return "install flash-attn, or a cuDNN that has a kernel for it"
