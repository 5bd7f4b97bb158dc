"""Exploration with a teacher around few labels or a long tail, against every control at equal teacher calls."""
