"""Many GPUs' mathematics: context parallelism, its exchanges, their ledger."""
