"""The serving engine and the vocabulary of deployments."""
