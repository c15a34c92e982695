"""Metrics of a server in Prometheus' format, with names and units by its guidelines."""

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from peftcore.routing import AdapterStore
from peftcore.serving.recording import Recorder

if TYPE_CHECKING:
    from peftcore.serving.generation import Generation

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds of the histograms' buckets (seconds)."""


class Metrics:
    """Metrics of one server.

    Args:
        store: The adapters, whose statistics are included.
        warnings: {source: text}, read at each scrape.
        recorder: The recorder, whose counts are included; None if nothing is recorded.
    """

    def __init__(self, store: AdapterStore, warnings: Mapping[str, str], recorder: Recorder | None = None):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "peftcore_requests", "Requests answered, by model and HTTP status", ["model", "status"], registry=registry
        )
        self.prompt_tokens = Counter("peftcore_prompt_tokens", "Prompt tokens processed", registry=registry)
        self.reused_tokens = Counter(
            "peftcore_prefix_cache_tokens", "Prompt tokens taken from the prefix cache", registry=registry
        )
        self.prefix_cache_bytes = Gauge(
            "peftcore_prefix_cache_bytes", "Size of the prefix cache in bytes", registry=registry
        )
        self.generated_tokens = Counter("peftcore_generated_tokens", "Tokens generated", registry=registry)
        self.grammars = Counter(
            "peftcore_grammars",
            "Requests with a grammar, by its kind and by result: compiled, cached or refused",
            ["kind", "result"],
            registry=registry,
        )
        self.grammar_tokens = Counter("peftcore_grammar_tokens", "Tokens generated under a grammar", registry=registry)
        self.grammar_seconds = Counter(
            "peftcore_grammar_mask_seconds", "CPU time to compute which tokens grammars allow", registry=registry
        )
        self.tool_calls = Counter("peftcore_tool_calls", "Tool calls in responses", registry=registry)
        self.queue_depth = Gauge("peftcore_queue_depth", "Requests waiting for a row", registry=registry)
        self.running_rows = Gauge("peftcore_running_rows", "Requests being decoded", registry=registry)
        self._first = Histogram(
            "peftcore_time_to_first_token_seconds",
            "Time from arrival to the first token",
            buckets=SECONDS,
            registry=registry,
        )
        self.latency = Histogram(
            "peftcore_request_seconds",
            "Time from arrival to the last byte of a response",
            buckets=SECONDS,
            registry=registry,
        )
        registry.register(_StoreStatistics(store))
        registry.register(_Warnings(warnings))
        if recorder is not None:
            registry.register(_RecorderCounts(recorder))

    def first_token(self, generation: "Generation") -> None:
        """Record the time to the first token of a request."""
        self._first.observe(time.monotonic() - generation.arrived)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _StoreStatistics(Collector):
    """Statistics of the adapter store."""

    def __init__(self, store: AdapterStore):
        self._store = store

    def collect(self) -> Iterator[Metric]:
        statistics = self._store.statistics()
        for name, description in {
            "hits": "Requests whose adapter was loaded already",
            "misses": "Requests whose adapter had to be loaded",
            "evictions": "Adapters evicted",
            "failures": "Adapters that failed to load",
        }.items():
            yield CounterMetricFamily(f"peftcore_adapter_{name}", description, value=statistics[name])
        yield GaugeMetricFamily("peftcore_adapters_loaded", "Adapters loaded", value=statistics["loaded"])
        yield GaugeMetricFamily(
            "peftcore_adapters_bytes", "Size of the loaded adapters in bytes", value=statistics["bytes"]
        )


class _RecorderCounts(Collector):
    """Counts of the recorder."""

    def __init__(self, recorder: Recorder):
        self._recorder = recorder

    def collect(self) -> Iterator[Metric]:
        written = CounterMetricFamily("peftcore_records", "Records on disk, by kind", labels=["kind"])
        for kind in ("answer", "rating"):
            written.add_metric([kind], self._recorder.written[kind])
        yield written
        dropped = CounterMetricFamily("peftcore_records_dropped", "Records not written, by reason", labels=["reason"])
        for reason in ("full", "disk", "redaction", "queue", "error"):
            dropped.add_metric([reason], self._recorder.dropped[reason])
        yield dropped
        yield GaugeMetricFamily("peftcore_records_bytes", "Size of the records in bytes", value=self._recorder.size)


class _Warnings(Collector):
    """Present warnings of the server by source."""

    def __init__(self, warnings: Mapping[str, str]):
        self._warnings = warnings

    def collect(self) -> Iterator[Metric]:
        gauge = GaugeMetricFamily("peftcore_warning", "1 if /ready shows a warning", labels=["source"])
        for source in list(self._warnings):
            gauge.add_metric([source], 1)
        yield gauge
