"""The client's side of the network: who is there, which way to go, what to do when a server fails. No autograd."""
