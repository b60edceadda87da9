"""The controller: monitor, predictor, planner, decision, guardrails, switch; the control service."""
