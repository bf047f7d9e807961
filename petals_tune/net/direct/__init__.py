"""Direct data connections: TCP from process to process, keyed over the p2p daemons' encrypted streams."""
