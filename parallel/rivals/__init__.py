"""What others send: all-gather, group cast, ring, Ulysses, in the same ledger."""
