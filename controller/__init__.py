"""The controller: monitor, predictor, planner, decision, guardrails; the control service."""
