"""What Prometheus reads: requests, images, batches, stages and the queue. One registry a server, so that several may live in a process."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from snoopi_rt.server.batcher import Drawing

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """The server's figures."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._made(Counter, "requests", "Requests answered.", ["path", "code"])
        self.seconds = self._made(Histogram, "request_seconds", "From a request's last byte to its answer.", ["path"], buckets=SECONDS)
        self.images = self._made(Counter, "images", "Images drawn.", ["model"])
        self.batch = self._made(Histogram, "batch_images", "Images drawn in one call.", ["model"], buckets=(1, 2, 4, 8, 16, 32, 64))
        self.stages = self._made(Histogram, "stage_seconds", "Seconds of a batch by stage.", ["model", "stage"], buckets=SECONDS)
        self.refused = self._made(Counter, "refused", "Requests that were not taken because the queue was full.", ["model"])
        self._waiting = self._made(Gauge, "waiting_images", "Images in the queue.", ["model"])

    def watch(self, model: str, drawing: Drawing) -> None:
        """Reads a model's queue whenever the figures are read."""
        self._waiting.labels(model).set_function(lambda: drawing.waiting)

    def text(self) -> bytes:
        """All figures in Prometheus' format."""
        return generate_latest(self._registry)

    def _made(self, kind: Any, name: str, what: str, labels: list[str], **more: Any) -> Any:
        return kind(f"snoopi_rt_{name}", what, labels, registry=self._registry, **more)
