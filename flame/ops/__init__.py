"""What every operation means: one op, one declaration; and the functions that users call."""
