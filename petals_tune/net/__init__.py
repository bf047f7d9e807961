"""Network layer: transports, connections, streams, the DHT and identities. Clients and servers both use it."""
