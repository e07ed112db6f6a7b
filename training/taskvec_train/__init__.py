"""The training recipe: distil a student from a teacher, train its task adapters, export it."""
