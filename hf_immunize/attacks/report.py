"""The report of an audit."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from hf_immunize.attacks.outcomes import AuditData


class AuditReport:
    """What an audit found.

    Args:
        data: The findings.
    """

    def __init__(self, data: AuditData) -> None:
        self.data = data

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write ``audit.json``."""
        (Path(folder) / "audit.json").write_text(json.dumps(asdict(self.data), indent=2))

    def summary(self) -> str:
        """The number of attacks."""
        return f"{len(self.data.outcomes)} attacks."
