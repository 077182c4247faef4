"""What happened once in the history of `demo --events`, and when."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

__all__ = ["PROBED", "SLOW", "Incident"]


@dataclass(frozen=True)
class Incident:
    """Something that happened once: on the latest day on which it began at least so long before the history's end.

    Attributes:
        hour: When it began, UTC.
        age: At least so long before the end; less than a day more.
        length: How long it went on.
    """

    hour: int
    age: timedelta
    length: timedelta

    def start(self, end: datetime) -> datetime:
        """When it began in the history that ends at `end`."""
        latest = end - self.age
        start = latest.replace(hour=self.hour, minute=0, second=0, microsecond=0)
        return start if start <= latest else start - timedelta(days=1)


PROBED = Incident(hour=10, age=timedelta(days=1), length=timedelta(minutes=30))
# While the nightly batch runs, which is every night: at other hours there are too few queries to see it.
SLOW = Incident(hour=2, age=timedelta(days=3), length=timedelta(minutes=90))
