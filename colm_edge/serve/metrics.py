"""What /metrics shows, in the format of Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  # seconds


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
        self.expert_calls = Counter("colm_expert_calls", "Evaluations by the experts.", **made)
        self.calls_by_expert = Counter(
            "colm_calls_by_expert", "Evaluations by each of several experts.", ["expert"], **made
        )
        self.prompt_tokens = Counter(
            "colm_prompt_tokens", "Tokens of the prompts of all answers.", **made
        )
        self.first_token = Histogram(
            "colm_first_token_seconds",
            "Seconds from a request's arrival to an answer's first token.",
            buckets=BUCKETS,
            **made,
        )
        self.answer = Histogram(
            "colm_answer_seconds",
            "Seconds from a request's arrival to an answer's end.",
            buckets=BUCKETS,
            **made,
        )
        self.busy = Gauge("colm_busy_slots", "Answers being written.", **made)
        self.waiting = Gauge("colm_waiting_requests", "Requests that wait for a slot.", **made)
        self.expert_loaded = Gauge("colm_expert_loaded", "Whether the expert is in memory.", **made)
