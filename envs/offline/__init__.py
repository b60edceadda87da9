"""`evaluate.py`: what logs and replays say of policies, told as tables, reports and gates."""
