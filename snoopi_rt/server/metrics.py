"""Prometheus metrics: requests, images, batches, stages and the queue. One registry per server, so that a process may run several."""

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from snoopi_rt.server.batcher import ServedModel

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._metric(Counter, "requests", "Requests answered.", ["path", "code"])
        self.seconds = self._metric(
            Histogram, "request_seconds", "From a request's headers to the end of its answer.", ["path"], buckets=SECONDS
        )
        self.images = self._metric(Counter, "images", "Images drawn.", ["model"])
        self.batch = self._metric(Histogram, "batch_images", "Images drawn in one call.", ["model"], buckets=(1, 2, 4, 8, 16, 32, 64))
        self.stages = self._metric(Histogram, "stage_seconds", "Seconds of a call by stage.", ["model", "stage"], buckets=SECONDS)
        self.refused = self._metric(Counter, "refused", "Requests refused because the queue was full.", ["model"])
        self._waiting = self._metric(Gauge, "waiting_images", "Images in the queue.", ["model"])

    def watch(self, model: ServedModel) -> None:
        """Reports a model's queue length whenever the metrics are scraped."""
        self._waiting.labels(model.name).set_function(lambda: model.waiting)

    def called(self, model: str, images: int, timings: Mapping[str, float]) -> None:
        """Observes one call of a model's pipeline, in which several requests may have been drawn."""
        self.batch.labels(model).observe(images)
        for stage, seconds in timings.items():
            self.stages.labels(model, stage).observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _metric(self, kind: Any, name: str, description: str, labels: list[str], **options: Any) -> Any:
        return kind(f"snoopi_rt_{name}", description, labels, registry=self._registry, **options)
