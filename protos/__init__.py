"""gRPC definitions and their generated stubs."""
