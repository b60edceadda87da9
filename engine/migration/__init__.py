"""Live switching: plan, transfer, switch."""
