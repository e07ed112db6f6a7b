"""The training stages of a recipe: distillation, then adapters."""
