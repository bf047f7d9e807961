"""The directory of servers in a distributed hash table (DHT): its keys, its records, and what a node keeps of them.

hivemind brings the peer-to-peer daemon, Kademlia's routing table and the messages; what is stored under which key, what
is believed and how much of it, is decided here.
"""
