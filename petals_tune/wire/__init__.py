"""What crosses the network, as values: no sockets, no threads. The client and the servers share this room."""
