"""What /metrics shows, in the format of Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """One server's counters and gauges; the server says where the gauges are read from."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        made: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "colm_requests", "Requests by path and status.", ["path", "status"], **made
        )
        self.tokens = Counter(
            "colm_tokens", "Tokens by the model that wrote them.", ["source"], **made
        )
        self.expert_calls = Counter("colm_expert_calls", "Evaluations by the expert.", **made)
        self.first_token = Histogram(
            "colm_first_token_seconds", "Seconds from an answer's slot to its first token.", **made
        )
        self.busy = Gauge("colm_busy_slots", "Answers being written.", **made)
        self.waiting = Gauge("colm_waiting_requests", "Answers that wait for a slot.", **made)
        self.expert_loaded = Gauge("colm_expert_loaded", "Whether the expert is in memory.", **made)
