"""Gymnasium environments over any drivable cluster, traces and workload generators."""
