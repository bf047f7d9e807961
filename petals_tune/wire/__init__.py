"""Messages, tensors, frames, records and tokens as values. No I/O; clients and servers share it."""
