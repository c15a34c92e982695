"""What a server counts, for Prometheus; names and units as its guide wants them."""

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from peftcore.routing import AdapterStore

if TYPE_CHECKING:
    from peftcore.serving.generation import Generation

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper ends of the histograms' buckets."""


class Metrics:
    """The counts of one server."""

    def __init__(self, store: AdapterStore, warnings: Mapping[str, str]):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "peftcore_requests", "Requests answered, by model and HTTP status", ["model", "status"], registry=registry
        )
        self.prompt_tokens = Counter("peftcore_prompt_tokens", "Tokens of prompts read", registry=registry)
        self.generated_tokens = Counter("peftcore_generated_tokens", "Tokens generated", registry=registry)
        self.queue_depth = Gauge("peftcore_queue_depth", "Requests that wait for a row", registry=registry)
        self.running_rows = Gauge("peftcore_running_rows", "Requests that are being decoded", registry=registry)
        self._first = Histogram(
            "peftcore_time_to_first_token_seconds",
            "From arrival to the first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.latency = Histogram(
            "peftcore_request_seconds", "From arrival to the last byte of an answer", buckets=SECONDS, registry=registry
        )
        registry.register(_OfStore(store))
        registry.register(_Warnings(warnings))

    def first_token(self, generation: "Generation") -> None:
        """Told when a request has its first token."""
        self._first.observe(time.monotonic() - generation.arrived)

    def text(self) -> bytes:
        """Everything, in Prometheus's format."""
        return generate_latest(self._registry)


class _OfStore(Collector):
    """The adapter store's own counts."""

    def __init__(self, store: AdapterStore):
        self._store = store

    def collect(self) -> Iterator[Metric]:
        found = self._store.statistics()
        for name, said in {
            "hits": "Adapters that were in the model when asked for",
            "misses": "Adapters that had to be loaded",
            "evictions": "Adapters that made room",
            "failures": "Adapters that could not be loaded",
        }.items():
            yield CounterMetricFamily(f"peftcore_adapter_{name}", said, value=found[name])
        yield GaugeMetricFamily("peftcore_adapters_loaded", "Adapters in the model", value=found["loaded"])
        yield GaugeMetricFamily("peftcore_adapters_bytes", "Their parameters, in bytes", value=found["bytes"])


class _Warnings(Collector):
    """Which parts of the server have a warning now."""

    def __init__(self, warnings: Mapping[str, str]):
        self._warnings = warnings

    def collect(self) -> Iterator[Metric]:
        gauge = GaugeMetricFamily("peftcore_warning", "1 where /ready shows a warning", labels=["source"])
        for source in list(self._warnings):
            gauge.add_metric([source], 1)
        yield gauge
