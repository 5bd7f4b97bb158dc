"""Teachers that learn beside the student, against the frozen one; and what their finite difference leaves out."""
