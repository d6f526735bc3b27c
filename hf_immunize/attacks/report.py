"""The report of an audit."""

from __future__ import annotations

from hf_immunize.attacks.outcomes import AuditData


class AuditReport:
    """What an audit found.

    Args:
        data: The findings.
    """

    def __init__(self, data: AuditData) -> None:
        self.data = data
