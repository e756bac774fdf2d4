"""Tables of the documents, and the line that says what was measured on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Content = Mapping[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def device_line(content: Content) -> str:
    """**NVIDIA H200**, driver …"""
    versions, device = content["versions"], content["device"]
    cudnn = versions["cudnn"]
    named = f"cuDNN {cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}"
    return (
        f"**{device['name']}**, driver {device['driver']}, torch {versions['torch']}, {named}, "
        f"triton {versions['triton']}, sources {content['sources']}"
    )
