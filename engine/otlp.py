"""Where spans are exported to. The packages are optional (extra `otel`)."""

from __future__ import annotations

from typing import Any

from engine.errors import InvalidRequestError


def open_exporter(endpoint: str, service_name: str) -> Any:
    """A tracer provider that exports to an OTLP gRPC endpoint such as http://localhost:4317.

    Raises InvalidRequestError when the packages are missing.
    """
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise InvalidRequestError(
            f"--otlp-traces-endpoint needs {error.name or 'opentelemetry'}, which is not "
            "installed; install the extra: pip install 'tidewright[otel]'."
        ) from error
    resource = Resource.create({"service.name": service_name})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
