"""The sealed log of audit events, and proofs from it that others can check."""
