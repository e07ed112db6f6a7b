"""Server processes: sockets, connections, workers, shutdown."""
