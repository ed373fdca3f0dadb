"""Ray: places the workers, watches them, ends them."""
