"""On which inputs a student learns besides its data: teacher-guided exploration, and the controls beside it."""
