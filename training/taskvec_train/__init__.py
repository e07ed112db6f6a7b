"""Training: distil a student from a teacher, train a LoRA adapter for each task, export them."""
