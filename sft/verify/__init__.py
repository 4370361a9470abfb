"""A user's own checkpoint, natively and by its directory's own code: `both_sides` runs and reports."""
