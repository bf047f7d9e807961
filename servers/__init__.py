"""Servers that host blocks of a model. Nothing in petals_tune imports this package.

Commands: `__main__` (host blocks), `dht` (a node of the DHT), `keys` (keys of a private swarm), `health` (a monitor).
One server: `server` runs it with `options`; it joins and places itself with `membership`, serves clients with
`requests`, orders the computation with `scheduling`, keeps clients' state in `stores` and reports `metrics`.
"""
