"""What `python -m vocojax.doctor` checks. Read next: findings.py."""
