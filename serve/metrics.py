"""Metrics for Prometheus: those of the engine, as it counts them, and those of the server."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from ..runtime.engine import Engine
    from .refusals import Refusal

LATENCIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)  # upper ends of bins, in seconds


class EngineCollector(Collector):
    """The engine's counters, gauges and histograms, read when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterable[Metric]:
        metrics = self.engine.metrics()
        for name, value in metrics["counters"].items():
            yield CounterMetricFamily(f"inferix_engine_{name}", f"{name} since the engine was loaded", value=value)
        for name, value in metrics["gauges"].items():
            yield GaugeMetricFamily(f"inferix_engine_{name}", f"{name} now", value=value)
        for name, histogram in metrics["histograms"].items():
            total, buckets = 0, []
            for bound, count in zip([*histogram["bounds"], float("inf")], histogram["counts"], strict=True):
                total += count
                buckets.append(("+Inf" if bound == float("inf") else str(bound), total))
            yield HistogramMetricFamily(
                f"inferix_engine_{name}", f"{name.replace('_', ' ')}", buckets=buckets, sum_value=histogram["sum"]
            )


class ServerMetrics:
    """Counters of the server itself."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        self.live = Gauge("inferix_live_sessions", "Live sessions, detached ones included", registry=self.registry)
        self.load = Gauge(
            "inferix_real_time_load", "Share of real time that live sessions take", registry=self.registry
        )
        self.connections = Gauge("inferix_connections", "Open WebSockets", registry=self.registry)
        self.refusals = Counter("inferix_refusals", "Refused requests", ["code", "limit"], registry=self.registry)
        self.skipped = Counter("inferix_blocks_skipped", "Blocks that slow viewers missed", registry=self.registry)
        self.sent = Counter("inferix_media_bytes", "Bytes of media sent", ["media"], registry=self.registry)
        self.control_to_pixel = Histogram(
            "inferix_control_to_pixel_seconds", "From a control's arrival to sending the first block that shows it",
            ["verb"], buckets=LATENCIES, registry=self.registry,
        )  # fmt: skip
        self.video_to_pixel = Histogram(
            "inferix_video_to_pixel_seconds", "From a picture of live video to sending the one made from it",
            buckets=LATENCIES, registry=self.registry,
        )  # fmt: skip

    def refused(self, refusal: Refusal) -> None:
        self.refusals.labels(refusal.code, refusal.limit[0] if refusal.limit else "").inc()

    def text(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
