"""The network seam: transports, streams, the directory, identities. Clients and servers stand on it."""
