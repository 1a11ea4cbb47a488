"""Prometheus metrics: requests, images, batches, stages and the queue. One registry per server, so that a process may run several."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from snoopi_rt.result import Result
from snoopi_rt.server.batcher import Drawing

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._metric(Counter, "requests", "Requests answered.", ["path", "code"])
        self.seconds = self._metric(Histogram, "request_seconds", "From a request's last byte to its answer.", ["path"], buckets=SECONDS)
        self.images = self._metric(Counter, "images", "Images drawn.", ["model"])
        self.batch = self._metric(Histogram, "batch_images", "Images drawn in one call.", ["model"], buckets=(1, 2, 4, 8, 16, 32, 64))
        self.stages = self._metric(Histogram, "stage_seconds", "Seconds of a batch by stage.", ["model", "stage"], buckets=SECONDS)
        self.refused = self._metric(Counter, "refused", "Requests refused because the queue was full.", ["model"])
        self._waiting = self._metric(Gauge, "waiting_images", "Images in the queue.", ["model"])

    def watch(self, model: str, drawing: Drawing) -> None:
        """Reports a model's queue length whenever the metrics are scraped."""
        self._waiting.labels(model).set_function(lambda: drawing.waiting)

    def drawn(self, model: str, result: Result) -> None:
        """Counts the images of a request, and the time its batch took."""
        self.images.labels(model).inc(len(result))
        for stage, seconds in result.timings.items():
            self.stages.labels(model, stage).observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _metric(self, kind: Any, name: str, description: str, labels: list[str], **options: Any) -> Any:
        return kind(f"snoopi_rt_{name}", description, labels, registry=self._registry, **options)
