"""From operations to programs that a device runs."""
