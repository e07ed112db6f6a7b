"""What an embedding request means, without HTTP and without tensors."""
