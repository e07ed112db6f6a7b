"""How good the vectors are: per task, number of dimensions and output type, on held-out data."""
